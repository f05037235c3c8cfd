# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
"""The clients: fio, and a pipelined libnbd client for the requests that fio does not have."""

import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

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


CROWD_MS = 50


def crowd(ctx, sock, runtime, **options):
    """fio with `numjobs`; returns requests a second while all jobs ran, and how many there were in all.

    fio divides by each job's own time. Where the server keeps the machine busy, jobs begin up to two seconds apart, and
    what ran alone would pass for what ran together.
    """
    requests = 0
    for attempt in range(4):
        with tempfile.TemporaryDirectory(dir=ctx.dir) as logs:
            job = fio(ctx, sock, time_based=1, runtime=runtime * 2 ** attempt, write_iops_log=f"{logs}/log",
                      log_avg_msec=CROWD_MS, log_unix_epoch=1, **options)
            requests += job["read"]["total_ios"] + job["write"]["total_ios"]
            together = rate_together([path.read_text() for path in Path(logs).glob("log_iops*")], runtime / 2)
        if together is not None:
            return together, requests
    raise RuntimeError("fio's jobs hardly ever ran all at once")


def rate_together(logs, at_least):
    """Of fio's IOPS logs, one of each job: the sum in the time that all of them cover; None if that is too short."""
    rows = [[[int(word) for word in line.split(",")[:3]] for line in log.splitlines()] for log in logs]
    if not all(rows):
        return None
    begin = max(job[0][0] for job in rows)
    end = min(job[-1][0] for job in rows)
    if end - begin < at_least * 1000:
        return None
    # A line is the mean of the time since the one before, of reads (0) or of writes (1).
    windows = (end - begin) / CROWD_MS
    return sum(value for job in rows for when, value, _ in job if begin < when <= end) / windows


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
