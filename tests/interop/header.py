#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# craft IMAGE: gives a version 3 image made by qemu-img a longer header, unknown extensions around the known ones, and
# unknown compatible and autoclear bits. same BEFORE AFTER: the header of AFTER differs from BEFORE in nothing but where
# L1 and refcount table are, and autoclear bits that are 0. incompatible IMAGE: needs a feature of an unknown bit.
"""Crafts headers that a future version of QEMU might write."""
import os
import struct
import sys

from qcow2_file import FEATURE_NAMES, FIELDS, Qcow2, feature_name

MAY_CHANGE = ("l1_offset", "refcount_table_offset", "refcount_table_clusters", "autoclear")


def craft(path, extra_length):
    with Qcow2(path) as q:
        # The byte of the compression type and its padding stay 0; what follows is unknown to everybody.
        extra = bytes(8) + os.urandom(extra_length - 8) if extra_length else b""
        before, after = (0x6e657731, os.urandom(13)), (0x6e657732, os.urandom(64))
        q.rewrite_header(extra, [before] + q.extensions() + [after, (0x6e657733, b"")])
        q["compatible"] = 1 | 1 << 7 | 1 << 63  # lazy refcounts, and two that nobody knows
        q["autoclear"] = 1 << 9 | 1 << 62


def same(before, after):
    with Qcow2(before) as a, Qcow2(after) as b:
        first, second = bytearray(a.read(0, a.cluster)), bytearray(b.read(0, a.cluster))
        for name in MAY_CHANGE:
            at, form = FIELDS[name]
            first[at:at + struct.calcsize(form)] = second[at:at + struct.calcsize(form)] = bytes(struct.calcsize(form))
        assert first == second, f"byte {next(i for i, x in enumerate(first) if x != second[i])} of the header changed"
        assert b["autoclear"] in (0, a["autoclear"]), f"autoclear bits are {b['autoclear']:#x}"
        print(f"autoclear={b['autoclear']:#x} l1_moved={a['l1_offset'] != b['l1_offset']}")


def incompatible(path):
    with Qcow2(path) as q:
        names = next(data for kind, data in q.extensions() if kind == FEATURE_NAMES)
        others = [e for e in q.extensions() if e[0] != FEATURE_NAMES]
        q.rewrite_header(b"", others + [(FEATURE_NAMES, names + feature_name(0, 17, "tea leaves"))])
        q["incompatible"] = 1 << 17


if __name__ == "__main__":
    if sys.argv[1] == "craft":
        craft(sys.argv[2], int(sys.argv[3]))
    elif sys.argv[1] == "same":
        same(*sys.argv[2:])
    else:
        incompatible(sys.argv[2])
