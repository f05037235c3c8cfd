# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
"""The clients: fio, and a pipelined libnbd client for the requests that fio does not have."""

import json
import os
import subprocess
import time

import nbd

import servers


def fio_command(sock, options):
    words = ["fio", "--name=bench", "--ioengine=nbd", f"--uri={servers.uri(sock)}", "--output-format=json",
             "--group_reporting=1", "--norandommap=1"]
    return words + [f"--{key}={value}" for key, value in options.items()]


def parse_fio(text):
    # Notes of libnbd and fio may stand before the JSON.
    job = json.loads(text[text.index("{"):])["jobs"][0]
    if job["error"]:
        raise RuntimeError(f"fio: error {job['error']}")
    return job


def fio(ctx, sock, **options):
    """One fio run against the default export; returns fio's report of the job."""
    options.setdefault("randseed", ctx.seed())
    for key in ("runtime", "ramp_time"):
        if key in options:
            options[key] = f"{options[key] * 1000:.0f}ms"  # fio takes 0.4 for 0, and then does the whole disk
    done = subprocess.run(fio_command(sock, options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          cwd=ctx.dir)
    if done.returncode or "{" not in done.stdout:
        raise RuntimeError(f"fio failed: {done.stderr.strip()} {done.stdout.strip()[:400]}")
    return parse_fio(done.stdout)


def iops(job):
    return job["read"]["iops"] + job["write"]["iops"]


def mib_per_second(job):
    return (job["read"]["bw_bytes"] + job["write"]["bw_bytes"]) / (1 << 20)


def pipelined(sock, request, total, size, depth=16):
    """Sends `request` ("trim" or "zero") over the whole disk in order, then FLUSH; returns seconds."""
    h = nbd.NBD()
    h.connect_unix(sock)
    send = {"trim": h.aio_trim, "zero": h.aio_zero}[request]
    flying = []
    begin = time.monotonic()
    for offset in range(0, total, size):
        while len(flying) >= depth:
            if not _reap(h, flying):
                h.poll(-1)
        flying.append(send(min(size, total - offset), offset))
    while flying:
        if not _reap(h, flying):
            h.poll(-1)
    h.flush()
    seconds = time.monotonic() - begin
    h.shutdown()
    return seconds


def _reap(h, flying):
    done = [cookie for cookie in flying if h.aio_command_completed(cookie)]
    for cookie in done:
        flying.remove(cookie)
    return done


def first_byte(command, offset):
    """Milliseconds from starting the server (socket activation: no polling) to 4 KiB of the disk having been read."""
    h = nbd.NBD()
    begin = time.monotonic()
    h.connect_systemd_socket_activation(command)
    h.pread(4096, offset)
    elapsed = (time.monotonic() - begin) * 1000
    h.shutdown()
    return elapsed


def percentile(ordered, share):
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


class FixedRate:
    """fio at a fixed rate in the background, with the latency of each request kept, so that a window can be cut out."""

    def __init__(self, ctx, sock, rate, seconds):
        self.prefix = ctx.path(f"lat{ctx.serial()}")
        options = {"rw": "randrw", "bs": "4k", "iodepth": 32, "time_based": 1, "runtime": seconds,
                   "rate_iops": f"{rate // 2},{rate // 2}", "randseed": ctx.seed(), "write_lat_log": self.prefix,
                   "log_unix_epoch": 1, "disable_slat": 1}
        self.proc = subprocess.Popen(fio_command(sock, options), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                     text=True, cwd=ctx.dir)
        time.sleep(1.0)  # until it is at its pace

    def finish(self):
        if self.proc.poll() is None:
            self.proc.terminate()
        out, err = self.proc.communicate(timeout=120)
        if "{" not in out:
            raise RuntimeError(f"fio failed: {err.strip()} {out.strip()[:400]}")
        parse_fio(out)

    def latencies(self, begin, end):
        """Sorted microseconds of the requests that ended between two time.time()s."""
        found = []
        with open(self.prefix + "_clat.1.log") as f:
            for line in f:
                at, nanoseconds = line.split(",")[:2]
                if begin * 1000 <= int(at) <= end * 1000:
                    found.append(int(nanoseconds) / 1000)
        for kind in ("clat", "lat", "slat"):
            path = f"{self.prefix}_{kind}.1.log"
            if os.path.exists(path):
                os.unlink(path)
        if len(found) < 100:
            raise RuntimeError(f"only {len(found)} requests in the window of {end - begin:.1f} s")
        return sorted(found)
