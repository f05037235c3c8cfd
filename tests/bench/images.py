# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
"""Makes the images that are measured. What is large is sparse; what is crafted passes `qemu-img check`."""

import array
import os
import random
import struct
import subprocess
import sys

import nbd

import servers

CLUSTER = 65536
COPIED = 1 << 63
ENTRIES = CLUSTER // 8  # of an L2 table: 512 MiB of disk
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40


def run(*command):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout.strip()}")
    return done.stdout


def sync(path):
    """Nobody's dirty pages may be billed to the next measurement."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def warm(path):
    """In the page cache and clean, and cached in the same way whoever wrote the file.

    ext4 keeps what was written in one piece in one large folio, and a 4 KiB write into a folio of 2 MiB costs several
    times what it costs in a small one: without this, files with the same bytes are up to three times slower or faster.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        while os.read(fd, CLUSTER):
            pass
    finally:
        os.close(fd)


def create(path, size, **options):
    words = ["qemu-img", "create", "-q", "-f", "qcow2"]
    if options:
        words += ["-o", ",".join(f"{k}={v}" for k, v in options.items())]
    run(*words, path, str(size))


def copy(source, target):
    """A copy with the same holes, in the page cache and clean."""
    if os.path.exists(target):
        os.unlink(target)
    run("cp", "--sparse=always", "--reflink=never", source, target)
    warm(target)


def random_raw(path, size):
    with open(path, "wb") as f:
        for _ in range(size // (4 * MIB)):
            f.write(os.urandom(4 * MIB))
    sync(path)


def full_images(ctx, names, size):
    """The same random bytes for each contender: raw, or as a fully allocated image in guest order."""
    base = ctx.path("full.raw")
    if not os.path.exists(base):
        random_raw(base, size)
    paths = {}
    for name in names:
        paths[name] = base if name == "raw" else ctx.path(f"full-{ctx.slug(name)}.qcow2")
        if not os.path.exists(paths[name]):
            run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", base, paths[name])
        warm(paths[name])
    return paths


def bloated(ctx, disk_size):
    """Half of the disk written by qemu-nbd in random order, cluster by cluster, and half of that trimmed again."""
    path = ctx.path(f"bloated-{disk_size // MIB}.qcow2")
    if os.path.exists(path):
        return path
    create(path, disk_size)
    chance = random.Random(1)
    written = chance.sample(range(disk_size // CLUSTER), disk_size // CLUSTER // 2)
    trimmed = chance.sample(written, len(written) // 2)
    with servers.start(ctx, "qemu-nbd", path) as server:
        h = nbd.NBD()
        h.connect_unix(server.sock)
        for cluster in written:
            h.pwrite(os.urandom(CLUSTER), cluster * CLUSTER)
        h.flush()
        for cluster in trimmed:
            h.trim(CLUSTER, cluster * CLUSTER)
        h.flush()
        h.shutdown()
    sync(path)
    return path


def craft(path, disk_size, tables, scattered=False):
    """An image whose L1 entries `tables` have full L2 tables. The data clusters are holes of the host file.

    scattered: the clusters of the disk are strewn over a file twice as long as needed (every second cluster is free).
    len(tables) must then be a power of two.
    """
    data = len(tables) * ENTRIES
    spread = 2 if scattered else 1
    l1_entries = -(-disk_size // (ENTRIES * CLUSTER))
    l1_clusters = -(-l1_entries * 8 // CLUSTER)
    blocks = 1
    while True:
        table_clusters = -(-blocks * 8 // CLUSTER)
        first_data = 1 + l1_clusters + table_clusters + blocks + len(tables)
        total = first_data + spread * data
        needed = -(-total // (CLUSTER // 2))
        if needed <= blocks:
            break
        blocks = needed
    l1 = 1
    reftable = l1 + l1_clusters
    first_block = reftable + table_clusters
    first_table = first_block + blocks

    with open(path, "wb") as f:
        f.write(struct.pack(">4sIQIIQIIQQIIQQQQII", b"QFI\xfb", 3, 0, 0, 16, disk_size, 0, l1_entries, l1 * CLUSTER,
                            reftable * CLUSTER, table_clusters, 0, 0, 0, 0, 0, 4, 104))
        entries = array.array("Q", bytes(l1_entries * 8))
        for n, index in enumerate(tables):
            entries[index] = (first_table + n) * CLUSTER | COPIED
        _put(f, l1, entries)
        _put(f, reftable, array.array("Q", [(first_block + n) * CLUSTER for n in range(blocks)]))
        f.seek(first_block * CLUSTER)
        f.write(b"\0\1" * first_data)
        f.write((b"\0\1" + b"\0\0" * (spread - 1)) * data)
        mask = data - 1
        for n in range(len(tables)):
            at = range(n * ENTRIES, (n + 1) * ENTRIES)
            if scattered:
                slots = [(first_data + 2 * (i * 0x9E3779B1 & mask)) * CLUSTER | COPIED for i in at]
            else:
                slots = [(first_data + i) * CLUSTER | COPIED for i in at]
            _put(f, first_table + n, array.array("Q", slots))
        f.truncate(total * CLUSTER)
    sync(path)


def _put(f, cluster, words):
    if sys.byteorder == "little":
        words.byteswap()
    f.seek(cluster * CLUSTER)
    f.write(words.tobytes())
