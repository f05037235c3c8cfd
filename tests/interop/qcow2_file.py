# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# The bytes of a QCOW2 image, for tests that craft or damage one: header fields and extensions, entries of L1, L2 and
# refcount structures. It checks nothing and keeps nothing consistent; that is the point.
"""Reads and writes single fields of a QCOW2 image."""
import os
import struct

FIELDS = {  # name: (offset, struct format)
    "version": (4, ">I"), "backing_offset": (8, ">Q"), "backing_size": (16, ">I"), "cluster_bits": (20, ">I"),
    "size": (24, ">Q"), "crypt": (32, ">I"), "l1_size": (36, ">I"), "l1_offset": (40, ">Q"),
    "refcount_table_offset": (48, ">Q"), "refcount_table_clusters": (56, ">I"), "snapshots": (60, ">I"),
    "snapshots_offset": (64, ">Q"), "incompatible": (72, ">Q"), "compatible": (80, ">Q"), "autoclear": (88, ">Q"),
    "refcount_order": (96, ">I"), "header_length": (100, ">I"),
}
COPIED, COMPRESSED, ZERO = 1 << 63, 1 << 62, 1
OFFSET = 0x00fffffffffffe00
FEATURE_NAMES = 0x6803f857


class Qcow2:
    def __init__(self, path):
        self.path = path
        self.file = open(path, "r+b", buffering=0)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def read(self, at, length):
        return os.pread(self.file.fileno(), length, at).ljust(length, b"\0")

    def write(self, at, data):
        os.pwrite(self.file.fileno(), data, at)

    def length(self):
        return os.fstat(self.file.fileno()).st_size

    def word(self, at):
        return struct.unpack(">Q", self.read(at, 8))[0]

    def set_word(self, at, value):
        self.write(at, struct.pack(">Q", value))

    def __getitem__(self, name):
        if name == "header_length" and self["version"] == 2:
            return 72
        if name == "refcount_order" and self["version"] == 2:
            return 4
        at, form = FIELDS[name]
        return struct.unpack(form, self.read(at, struct.calcsize(form)))[0]

    def __setitem__(self, name, value):
        at, form = FIELDS[name]
        self.write(at, struct.pack(form, value))

    @property
    def cluster(self):
        return 1 << self["cluster_bits"]

    # --- header extensions ---

    def extensions(self):
        found, at = [], self["header_length"]
        while True:
            kind, length = struct.unpack(">II", self.read(at, 8))
            if kind == 0:
                return found
            found.append((kind, self.read(at + 8, length)))
            at += 8 + (length + 7) // 8 * 8

    def rewrite_header(self, extra=b"", extensions=None):
        """Version 3: fixed fields, then `extra` from byte 104 on, then the extensions (default: those it has)."""
        extensions = self.extensions() if extensions is None else extensions
        data = extra
        for kind, content in extensions:
            data += struct.pack(">II", kind, len(content)) + content + bytes(-len(content) % 8)
        data += bytes(8)
        assert 104 + len(data) <= self.cluster and not self["backing_offset"]
        self["header_length"] = 104 + len(extra)
        self.write(104, data.ljust(self.cluster - 104, b"\0"))

    # --- mapping ---

    def l1_at(self, i):
        return self["l1_offset"] + 8 * i

    def tables(self):
        """(L1 index, offset of the L2 table) of every table."""
        words = struct.unpack(f">{self['l1_size']}Q", self.read(self["l1_offset"], 8 * self["l1_size"]))
        return [(i, w & OFFSET) for i, w in enumerate(words) if w & OFFSET]

    def l2_at(self, guest_cluster):
        per_table = self.cluster // 8
        table = self.word(self.l1_at(guest_cluster // per_table)) & OFFSET
        assert table, f"guest cluster {guest_cluster} has no L2 table"
        return table + 8 * (guest_cluster % per_table)

    def data(self):
        """(where the entry is, the entry) of every guest cluster with a host cluster of its own."""
        found = []
        for _, table in self.tables():
            words = struct.unpack(f">{self.cluster // 8}Q", self.read(table, self.cluster))
            found += [(table + 8 * i, w) for i, w in enumerate(words) if w & OFFSET and not w & COMPRESSED]
        return found

    # --- refcounts ---

    def blocks(self):
        n = self["refcount_table_clusters"] * self.cluster // 8
        words = struct.unpack(f">{n}Q", self.read(self["refcount_table_offset"], 8 * n))
        return [(i, w & OFFSET) for i, w in enumerate(words) if w & OFFSET]

    def has_refcount(self, cluster):
        """There is a refcount block that counts this host cluster."""
        i = cluster // (self.cluster * 8 >> self["refcount_order"])
        return i < self["refcount_table_clusters"] * self.cluster // 8 and \
            self.word(self["refcount_table_offset"] + 8 * i) & OFFSET != 0

    def refcount_place(self, cluster):
        """(byte, shift, bits) of the refcount of a host cluster."""
        bits = 1 << self["refcount_order"]
        per_block = self.cluster * 8 // bits
        block = self.word(self["refcount_table_offset"] + 8 * (cluster // per_block)) & OFFSET
        assert block, f"host cluster {cluster} has no refcount block"
        at = cluster % per_block * bits
        return block + at // 8, at % 8, bits

    def refcount(self, cluster):
        at, shift, bits = self.refcount_place(cluster)
        if bits >= 8:
            return int.from_bytes(self.read(at, bits // 8), "big")
        return self.read(at, 1)[0] >> shift & ((1 << bits) - 1)

    def set_refcount(self, cluster, value):
        at, shift, bits = self.refcount_place(cluster)
        if bits >= 8:
            return self.write(at, value.to_bytes(bits // 8, "big"))
        mask = ((1 << bits) - 1) << shift
        self.write(at, bytes([self.read(at, 1)[0] & ~mask | value << shift]))


def feature_name(kind, bit, name):
    """One entry of the feature name table; kind 0: incompatible, 1: compatible, 2: autoclear."""
    return struct.pack(">BB46s", kind, bit, name.encode())
