# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
"""Rows about guest I/O: what a running machine feels."""

import os
from contextlib import ExitStack

import images
import measure
import servers
from images import GIB, MIB, TIB
from results import Result

WORK = {
    "4k random read": {"rw": "randread", "bs": "4k"},
    "4k random write": {"rw": "randwrite", "bs": "4k"},
    "4k random mixed": {"rw": "randrw", "bs": "4k"},
    "1M sequential read": {"rw": "read", "bs": "1M"},
    "1M sequential write": {"rw": "write", "bs": "1M"},
}
QUEUES = {
    "QD32": ({"iodepth": 32}, 0.90),
    "QD1": ({"iodepth": 1}, 0.95),
    "4 connections": ({"iodepth": 8, "numjobs": 4}, 0.95),
}


def interleave(ctx, contenders, once):
    """once(name) for A B C A B C ...; the order turns by one each round, so that nobody is always the first."""
    values = {name: [] for name in contenders}
    for turn in range(ctx.rounds):
        for place in range(len(contenders)):
            name = contenders[(turn + place) % len(contenders)]
            values[name].append(once(name))
    return values


def steady(ctx):
    """Rows over a fully allocated image in the page cache; all servers run, one at a time is asked."""
    contenders = ["ours", "raw"] + list(ctx.qemu)
    size = 256 * MIB if ctx.short else GIB
    paths = images.full_images(ctx, contenders, size)
    with ExitStack() as stack:
        running = {name: stack.enter_context(servers.start(ctx, name, paths[name])) for name in contenders}

        def row(title, options, limit, unit, value, contenders=contenders):
            def once(name):
                if "numjobs" in options:
                    rate, _ = measure.crowd(ctx, running[name].sock, ctx.runtime, **options)  # a request is 4k, or 1 MiB
                else:
                    rate = value(measure.fio(ctx, running[name].sock, time_based=1, runtime=ctx.runtime, **options))
                images.sync(paths[name])
                return rate

            return Result(title, unit, interleave(ctx, contenders, once)).at_least(limit, "raw")

        for queue, (extra, limit) in QUEUES.items():
            for work, options in WORK.items():
                title = f"{work}, {queue}"
                if not ctx.wants(title):
                    continue
                options = {**options, **extra}
                if "numjobs" in extra and options["bs"] == "1M":
                    options["offset_increment"] = size // 4
                unit, value = ("MiB/s", measure.mib_per_second) if options["bs"] == "1M" else ("IOPS", measure.iops)
                # Short: who is no part of the target is left out.
                result = row(title, options, limit, unit, value,
                             contenders if queue == "QD32" or not ctx.short else ["ours", "raw"])
                if queue == "QD32":
                    result.at_least(1.5, "qemu")
                yield result
        if ctx.wants("16 connections"):
            # Throughput follows from how the host pairs 16 clients with 16 threads; what the server itself takes does not.
            costs = {name: [] for name in contenders}

            def crowd(name):
                before = running[name].cpu_seconds()
                rate, requests = measure.crowd(ctx, running[name].sock, ctx.runtime, rw="randread", bs="4k", iodepth=1,
                                               numjobs=16)
                costs[name].append((running[name].cpu_seconds() - before) * 1e6 / requests)
                return rate

            yield Result("4k random read, 16 connections", "IOPS", interleave(ctx, contenders, crowd))
            yield Result("4k random read, 16 connections: CPU of the server", "us a request", costs,
                         higher_is_better=False).at_most(1.05, "raw")
        if ctx.wants("4k write + flush each"):
            def once(name):
                job = measure.fio(ctx, running[name].sock, rw="randwrite", bs="4k", iodepth=1, fsync=1, time_based=1,
                                  runtime=max(ctx.runtime, 1))
                return measure.iops(job)

            yield Result("4k write + flush each", "IOPS", interleave(ctx, contenders, once)).at_least(1.0, "qemu")


def fresh(ctx):
    """Rows over an image that has nothing yet; each measurement gets a new one."""
    contenders = ["ours", "raw"] + list(ctx.qemu)

    def measured(disk, value, **options):
        def once(name):
            path = ctx.path("fresh")
            images.create(path, disk) if name != "raw" else images.run("truncate", "-s", str(disk), path)
            try:
                with servers.start(ctx, name, path) as server:
                    return value(measure.fio(ctx, server.sock, **options))
            finally:
                os.unlink(path)

        return interleave(ctx, contenders, once)

    size = 256 * MIB if ctx.short else 2 * GIB
    for kind, rw in (("sequential", "write"), ("random", "randwrite")):
        title = f"64k allocating write, {kind}"
        if ctx.wants(title):
            # A random order that meets each cluster once, so that all writes allocate.
            yield Result(title, "MiB/s", measured(size, measure.mib_per_second, rw=rw, bs="64k", iodepth=32,
                                                  norandommap=0)).at_least(1.0, "qemu")
    title = "4k write + flush each, allocating"
    if ctx.wants(title):
        yield Result(title, "IOPS", measured(64 * GIB, measure.iops, rw="randwrite", bs="4k", iodepth=1, fsync=1,
                                             time_based=1, runtime=max(ctx.runtime, 1))).at_least(1.0, "qemu")


def discards(ctx):
    """fstrim-like: the whole allocated disk in order, FLUSH included, on a new image each time."""
    contenders = ["ours", "raw"] + list(ctx.qemu)
    shapes = [("falloc", 4 * GIB if ctx.short else 16 * GIB)]
    if not ctx.short:
        shapes.append(("metadata", 100 * GIB))  # the clusters are holes of the host file: only metadata is at work
    for shape, size in shapes:
        for request in ("trim", "zero"):
            for bs in (MIB, GIB):
                title = f"{request} {size // GIB} GiB {shape}, {'1 MiB' if bs == MIB else '1 GiB'} requests"
                if not ctx.wants(title):
                    continue

                def once(name):
                    path = ctx.path("allocated")
                    if name != "raw":
                        images.create(path, size, preallocation=shape)
                    else:
                        images.run(*(["fallocate", "-l"] if shape == "falloc" else ["truncate", "-s"]), str(size), path)
                    images.sync(path)
                    try:
                        with servers.start(ctx, name, path) as server:
                            return size / GIB / measure.pipelined(server.sock, request, size, bs)
                    finally:
                        os.unlink(path)

                yield Result(title, "GiB/s", interleave(ctx, contenders, once)).at_least(1.5, "qemu")


def large(ctx):
    """1 TiB fully mapped: 128 MiB of L2 tables, four times QEMU's default cache. The data are holes of the host file."""
    contenders = ["ours", "raw"] + list(ctx.qemu)
    paths = {name: ctx.path("1T.qcow2") for name in contenders}
    paths["raw"] = ctx.path("1T.raw")
    images.craft(paths["ours"], TIB, range(TIB // images.ENTRIES // images.CLUSTER))
    images.run("truncate", "-s", str(TIB), paths["raw"])
    with ExitStack() as stack:
        running = {name: stack.enter_context(servers.start(ctx, name, paths[name], read_only=True))
                   for name in contenders}

        def once(name):
            # Each round reads other places: what it finds in the page cache is metadata, not data.
            job = measure.fio(ctx, running[name].sock, rw="randread", bs="4k", iodepth=32, time_based=1,
                              runtime=max(ctx.runtime, 1), ramp_time=1 if ctx.short else 3)
            return measure.iops(job)

        yield Result("4k random read over 1 TiB", "IOPS", interleave(ctx, contenders, once)).at_least(2.0, "qemu-nbd")
    for path in set(paths.values()):
        os.unlink(path)


ROWS = {"steady": steady, "fresh": fresh, "discards": discards, "large": large}
