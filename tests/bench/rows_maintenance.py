# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
"""Rows about opening, memory, planning and compacting, and what the guest feels of it."""

import json
import os
import subprocess
import threading
import time

import images
import measure
import nbd
import servers
from images import GIB, MIB, TIB
from results import Result
from rows_io import interleave


def opening(ctx):
    """8 TiB with 1 TiB allocated, against 1 GiB: nothing at open may grow with the image."""
    sock = ctx.path("unused.sock")
    paths = {"ours": ctx.path("8T.qcow2"), "raw": ctx.path("8T.raw"), "ours, 1 GiB": ctx.path("1G.qcow2")}
    images.craft(paths["ours"], 8 * TIB, range(0, 16384, 8))
    images.create(paths["ours, 1 GiB"], GIB, preallocation="metadata")
    images.run("truncate", "-s", str(8 * TIB), paths["raw"])
    contenders = list(paths) + list(ctx.qemu)

    def command(name):
        words = servers.command_of(ctx, name.split(",")[0], paths.get(name, paths["ours"]), sock)
        # Socket activation brings the socket: no -U, -k.
        at = words.index("-k" if servers.is_qemu(name) else "-U")
        return words[:at] + words[at + 2:]

    def once(name):
        return measure.first_byte(command(name), 0 if name == "ours, 1 GiB" else 4 * TIB + 64 * MIB)

    if ctx.wants("open of 8 TiB"):
        values = {name: [] for name in contenders}
        for _ in range(1 if ctx.short else 3):
            for name, found in interleave(ctx, contenders, once).items():
                values[name] += found
        # "no slower" within what two runs of the same differ by
        yield (Result("open of 8 TiB, to the first byte", "ms", values, higher_is_better=False)
               .below(50).at_most(1.10, "ours, 1 GiB"))
    if ctx.wants("memory"):
        yield memory(ctx, paths)
    for path in paths.values():
        os.unlink(path)


def touch_all_tables(ctx, sock):
    """Reads through every L2 table once, and then here and there for a while."""
    h = nbd.NBD()
    h.connect_unix(sock)
    step = images.ENTRIES * images.CLUSTER
    for at in range(0, h.get_size(), step):
        h.pread(4096, at)
    h.shutdown()
    measure.fio(ctx, sock, rw="randread", bs="4k", iodepth=32, time_based=1, runtime=max(ctx.runtime, 1))


def memory(ctx, paths):
    """The highest resident size after reading all over 8 TiB with 1 TiB allocated, that is 128 MiB of L2 tables. The
    bound is the manual's (MEMORY): 1.25 times the cache, and 2 MiB for each TiB of the file."""
    def once(name):
        kind, _, rest = name.partition(",")
        options = {"parameters": ["metadata-cache=8M"]} if "8M" in rest else {}
        path = paths["ours, 1 GiB"] if "1 GiB" in rest else paths["raw"] if kind == "raw" else paths["ours"]
        with servers.start(ctx, kind, path, read_only=True, **options) as server:
            touch_all_tables(ctx, server.sock)
            return server.memory() / MIB

    contenders = ["ours", "ours, metadata-cache=8M", "ours, 1 GiB", "raw"] + list(ctx.qemu)
    result = Result("memory serving it", "MiB RSS", interleave(ctx, contenders, once), higher_is_better=False)
    base = result.median("ours, 1 GiB")
    for name, cache in (("ours", 64), ("ours, metadata-cache=8M", 8)):
        limit, value = base + cache * 1.25 + 2, result.median(name)
        result.target(f"<= {limit:.0f} MiB (1 GiB's {base:.0f} + 1.25 x the {cache} MiB of metadata-cache + 2)", value,
                      value <= limit, f"{value:.0f} MiB")
    return result


class Watch(threading.Thread):
    """Samples the blocks that the files named take, every 5 ms, and keeps the highest sum."""

    def __init__(self, *paths):
        super().__init__(daemon=True)
        self.paths, self.highest, self.done = paths, 0, threading.Event()
        self.start()

    def run(self):
        while not self.done.is_set():
            self.highest = max(self.highest, sum(os.stat(p).st_blocks * 512 for p in self.paths if os.path.exists(p)))
            self.done.wait(0.005)

    def stop(self):
        self.done.set()
        self.join()
        return self.highest


def planned(ctx, target, export="compact"):
    """Seconds that the plan took, and the bytes in it."""
    begin = time.monotonic()
    said = json.loads(images.run(ctx.qlean, "plan", "--json", target, export))
    seconds = time.monotonic() - begin
    return seconds, said["exports"][0]["bytes"]


def compacting(ctx):
    disk = GIB if ctx.short else 4 * GIB
    source = images.bloated(ctx, disk)
    work, target = ctx.path("work.qcow2"), ctx.path("target.qcow2")
    facts = {}  # of the last round

    def timed(function):
        begin = time.monotonic()
        function()
        return time.monotonic() - begin

    def offline(*extra):
        images.copy(source, work)
        return timed(lambda: images.run(ctx.qlean, "compact", "-q", *extra, work))

    def served():
        images.copy(source, work)
        before = os.stat(work).st_blocks * 512
        with servers.start(ctx, "ours", work) as server:
            _, must = planned(ctx, server.sock)
            written = server.io("wchar")
            watch = Watch(work)
            seconds = timed(lambda: images.run(ctx.qlean, "compact", "-q", server.sock))
            facts.update(extra=watch.stop() - before, must=must, before=before,
                         written=server.io("wchar") - written)
        facts["length"] = os.stat(work).st_size
        return seconds

    def convert():
        images.copy(source, work)

        def both():
            images.run("qemu-img", "convert", "-O", "qcow2", work, target)
            images.sync(target)

        seconds = timed(both)
        facts["convert_length"] = os.stat(target).st_size
        os.unlink(target)
        return seconds

    def mirror():
        images.copy(source, work)
        images.create(target, disk)
        with servers.StorageDaemon(ctx) as daemon:
            seconds = timed(lambda: (daemon.mirror(work, target), images.sync(target)))
        os.unlink(target)
        return seconds

    once = {"ours": lambda: offline(), "ours, --no-zeroes": lambda: offline("--no-zeroes"), "ours, served": served,
            "qemu-img convert": convert, "mirror job": mirror}
    values = interleave(ctx, list(once), lambda name: once[name]())
    yield (Result(f"compact of the bloated image ({disk // GIB} GiB disk)", "s", values, higher_is_better=False)
           .at_most(0.6, "qemu-img convert"))

    images.run("qemu-img", "check", work) if os.path.exists(work) else None
    # The kernel's own count (write_bytes in /proc) is of dirtied folios of the page cache, which may be larger than what
    # is written to them; what reaches the disk is nearer to the write calls.
    share = facts["written"] / facts["must"]
    yield (Result("  bytes written", "MiB", {"ours": [facts["written"] / MIB], "must move": [facts["must"] / MIB]}, False)
           .target("<= 1.05 x must move", share, share <= 1.05, f"{share:.3f} x"))
    share = facts["extra"] / facts["before"]
    yield (Result("  extra space at the peak", "MiB", {"ours": [facts["extra"] / MIB]}, higher_is_better=False)
           .target("<= 1 %", share, share <= 0.01, f"{share:.2%}"))
    share = facts["length"] / facts["convert_length"]
    yield (Result("  length afterwards", "MiB", {"ours": [facts["length"] / MIB],
                                               "qemu-img convert": [facts["convert_length"] / MIB]}, False)
           .target("<= 1.01 x convert", share, share <= 1.01, f"{share:.3f} x"))
    os.unlink(work)


def planning(ctx):
    """A plan for scattered clusters: every second cluster of the file is free."""
    tables = 256 if ctx.short else 2048
    tib = tables / 2048
    path = ctx.path("scattered.qcow2")
    images.craft(path, int(tib * TIB), range(tables), scattered=True)
    memory_used = []

    def once(_):
        with servers.start(ctx, "ours", path) as server:
            before = server.memory()
            seconds, must = planned(ctx, server.sock)
            if must < tib * TIB / 4:
                raise RuntimeError(f"the plan moves {must} bytes only; half of {tib} TiB lies too far out")
            memory_used.append((server.memory() - before) / MIB)
            return seconds

    result = Result(f"plan for {tib:g} TiB of scattered clusters", "s", interleave(ctx, ["ours"], once), False)
    result.below(2 * tib)
    more = max(memory_used)
    limit = 64 + 160 * tib  # metadata-cache; 10 bytes for each of the clusters, of which a TiB has 16 million
    yield result.target(f"<= {limit:.0f} MiB more memory", more, more <= limit, f"{more:.0f} MiB more")
    os.unlink(path)


def guest_latency(ctx):
    """A guest at half of what it could do, with and without compaction beside it; latencies of the same window."""
    disk = GIB if ctx.short else 8 * GIB
    source, work = images.bloated(ctx, disk), ctx.path("work.qcow2")
    images.copy(source, work)
    with servers.start(ctx, "ours", work) as server:
        job = measure.fio(ctx, server.sock, rw="randrw", bs="4k", iodepth=32, time_based=1, runtime=2)
    rate = int(measure.iops(job) / 2)
    shares = {"p99": 0.99, "p99.9": 0.999, "max": 1.0}
    found = {(name, share): [] for name in ("beside", "idle") for share in shares}
    durations = []
    for _ in range(ctx.rounds):
        for name in ("beside", "idle"):
            images.copy(source, work)
            with servers.start(ctx, "ours", work) as server:
                guest = measure.FixedRate(ctx, server.sock, rate, 300)
                begin = time.time()
                try:
                    if name == "beside":
                        images.run(ctx.qlean, "compact", "-q", *ctx.compact_options, server.sock)
                        durations.append(time.time() - begin)
                    else:
                        time.sleep(durations[-1])
                finally:
                    end = time.time()
                    guest.finish()
                ordered = guest.latencies(begin, end)
            for share, part in shares.items():
                found[name, share].append(measure.percentile(ordered, part) / 1000)
    os.unlink(work)
    for share, limit in (("p99", 1.25), ("p99.9", 2.0), ("max", None)):
        result = Result(f"guest beside compact, 4k mixed at {rate}/s: {share}", "ms",
                        {"ours": found["beside", share], "idle": found["idle", share]}, higher_is_better=False)
        if limit:
            result.at_most(limit, "idle")
        else:
            more = max(found["beside", share]) - max(found["idle", share])
            result.target("<= 50 ms more than idle", more, more <= 50, f"{more:.1f} ms more")
        yield result.note(f"compaction took {min(durations):.1f} to {max(durations):.1f} s")


ROWS = {"opening": opening, "compacting": compacting, "planning": planning, "guest": guest_latency}
