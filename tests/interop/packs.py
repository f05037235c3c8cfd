#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# Reads the compressed extents of an image by its own means, for tests that judge how closely they are packed, and
# damages one of them on request.
"""usage: packs.py IMAGE [--damage GUEST_OFFSET]: prints clusters that hold compressed extents, clusters that would do,
extents, and guest offset of the first extent."""
import struct
import sys
import zlib


def extents(image):
    """Yields guest offset, host offset and length, which reaches to the end of a sector."""
    image.seek(0)
    header = image.read(112)
    version, = struct.unpack_from(">I", header, 4)
    bits, = struct.unpack_from(">I", header, 20)
    l1_size, l1_at = struct.unpack_from(">IQ", header, 36)
    words = 2 if version == 3 and header[79] & 16 else 1
    image.seek(l1_at)
    l1 = struct.unpack(f">{l1_size}Q", image.read(8 * l1_size))
    per_table = (1 << bits) // 8 // words
    for i, table in enumerate(l1):
        table &= 0x00fffffffffffe00
        if table == 0:
            continue
        image.seek(table)
        raw = image.read(1 << bits)
        for n, entry in enumerate(struct.unpack(f">{len(raw) // 8}Q", raw)[::words]):
            if entry >> 62 & 1:
                shift = 62 - (bits - 8)
                at = entry & ((1 << shift) - 1)
                sectors = ((entry & ((1 << 62) - 1)) >> shift) + 1
                yield (i * per_table + n) << bits, at, sectors * 512 - at % 512


def exact(image, at, length, zstd):
    """Bytes of the extent that mean something; for zstd an estimate."""
    if zstd:
        return length - 256
    image.seek(at)
    raw = image.read(length)
    stream = zlib.decompressobj(-12)
    stream.decompress(raw)
    return len(raw) - len(stream.unused_data)


def main():
    with open(sys.argv[1], "r+b") as image:
        image.seek(20)
        bits, = struct.unpack(">I", image.read(4))
        image.seek(104)
        zstd = image.read(1) == b"\1"
        if len(sys.argv) > 3:
            for guest, at, length in extents(image):
                if guest == int(sys.argv[3]):
                    image.seek(at)
                    image.write(b"\xff" * min(length, 64))
                    return
            sys.exit("no compressed cluster there")
        packs, total, count, first = set(), 0, 0, -1
        for guest, at, length in list(extents(image)):
            first = guest if first < 0 else first
            packs.update(range(at >> bits, (at + length - 1 >> bits) + 1))
            total += exact(image, at, length, zstd)
            count += 1
        print(len(packs), -(-total >> bits), count, first)


main()
