#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# Usage: check.py QLEAN DIRECTORY [all]. Images of every kind, made by qemu-img, and damaged in every way that a check
# tells apart, alone and several at once: `qlean check` says of each what `qemu-img check` says, number for number. After
# `qlean check --repair all` neither finds anything, unless something is beyond repair, which `qemu-img check -r all`
# leaves too; and the disk has the bytes that it had. Without "all" some kinds of images get a random choice of the damages,
# and all of them fewer combinations. Random by QLEAN_SEED.
"""Compares qlean check with qemu-img check on damaged images."""
import filecmp
import json
import os
import random
import shutil
import subprocess
import sys

from qcow2_file import COMPRESSED, COPIED, OFFSET, ZERO, Qcow2

KEYS = {"leaks": "leaks", "corruptions": "corruptions", "check-errors": "check_errors",
        "image-end-offset": "image_end_offset", "total-clusters": "total_clusters",
        "allocated-clusters": "allocated_clusters", "fragmented-clusters": "fragmented_clusters",
        "compressed-clusters": "compressed_clusters"}


def run(*words):
    return subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=120, check=False)


def must(*words):
    done = run(*words)
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout


# --- images -------------------------------------------------------------------------------------------------------

def image(path, options, actions, size="8M", after=()):
    must("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, size)
    must("qemu-io", "-f", "qcow2", *[w for a in actions for w in ("-c", a)], path)
    for words in after:
        must(*[w.replace("IMAGE", path) for w in words])


WRITES = ("write -P 1 0 1M", "write -P 2 3M 300k", "write -P 3 5000k 70k", "discard 512k 128k", "write -z 2M 256k",
          "write -P 4 640k 64k")


def compressed(path):
    raw = path + ".raw"
    with open(raw, "wb") as f:
        for i in range(128):
            f.write((b"%06d" % i * 16384)[:65536] if i % 3 else bytes(65536))
    must("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", raw, path)
    must("qemu-io", "-f", "qcow2", "-c", "write -P 9 1M 200k", "-c", "discard 3M 1M", path)
    os.unlink(raw)


def snapshots(path):
    image(path, "cluster_size=4096", WRITES, after=[("qemu-img", "snapshot", "-c", "one", "IMAGE")])
    must("qemu-io", "-f", "qcow2", "-c", "write -P 7 256k 512k", path)
    must("qemu-img", "snapshot", "-c", "two", path)
    must("qemu-io", "-f", "qcow2", "-c", "write -P 8 0 64k", "-c", "discard 3M 100k", path)


BITMAP = [("qemu-img", "bitmap", "--add", "-g", "32k", "IMAGE", "b0"),
          ("qemu-io", "-f", "qcow2", "-c", "write 1M 1M", "IMAGE")]

IMAGES = {
    "plain": lambda p: image(p, "cluster_size=65536", WRITES),
    "small": lambda p: image(p, "cluster_size=512", WRITES),
    "v2": lambda p: image(p, "cluster_size=4096,compat=0.10", WRITES[:3]),
    "bits1": lambda p: image(p, "cluster_size=1024,refcount_bits=1", WRITES),
    "bits2": lambda p: image(p, "cluster_size=4096,refcount_bits=2", WRITES),
    "bits8": lambda p: image(p, "cluster_size=2048,refcount_bits=8,lazy_refcounts=on", WRITES),
    "bits64": lambda p: image(p, "cluster_size=512,refcount_bits=64", WRITES),
    "compressed": compressed,
    "snapshots": snapshots,
    "bitmaps": lambda p: image(p, "cluster_size=4096", WRITES, after=BITMAP),
    "subclusters": lambda p: image(p, "cluster_size=65536,extended_l2=on", WRITES),
    "data-file": lambda p: image(p, f"cluster_size=65536,data_file={p}.data", WRITES),
    "shrunk": lambda p: image(p, "cluster_size=4096", WRITES,
                              after=[("qemu-img", "resize", "-q", "-f", "qcow2", "--shrink", "IMAGE", "4M")]),
}


# --- damages ------------------------------------------------------------------------------------------------------
# Each takes an open image and a source of randomness, and gives False if the image has no place for it.

def some_entry(q, r, only=lambda w: not w & ZERO):
    found = [e for e in q.data() if only(e[1])]
    return r.choice(found) if found else (0, 0)


def external(q):
    return q["version"] == 3 and bool(q["incompatible"] & 4)


def leak(q, r):
    free = [c for c in range(q.length() // q.cluster) if q.refcount(c) == 0]
    if not free:
        os.ftruncate(q.file.fileno(), q.length() + 3 * q.cluster)
        free = [q.length() // q.cluster - 2]
    q.set_refcount(r.choice(free), 1)


def refcount_zero(q, r):
    at, word = some_entry(q, r)
    if not at or external(q):
        return False
    q.set_refcount((word & OFFSET) // q.cluster, 0)


def refcount_too_high(q, r):
    at, word = some_entry(q, r)
    if not at or external(q) or q["refcount_order"] == 0:
        return False
    cluster = (word & OFFSET) // q.cluster
    q.set_refcount(cluster, min(q.refcount(cluster) + 1, 3))


def metadata_uncounted(q, r):
    places = [0, q["l1_offset"] // q.cluster, q["refcount_table_offset"] // q.cluster]
    places += [t // q.cluster for _, t in q.tables()]
    q.set_refcount(r.choice(places), 0)


def flag_cleared(q, r):
    at, word = some_entry(q, r, lambda w: w & COPIED)
    if not at:
        return False
    q.set_word(at, word & ~COPIED)


def l1_flag_cleared(q, r):
    i, _ = r.choice(q.tables())
    q.set_word(q.l1_at(i), q.word(q.l1_at(i)) ^ COPIED)


def used_twice(q, r):
    (one, word), (other, _) = some_entry(q, r), some_entry(q, r)
    if not one or one == other:
        return False
    q.set_word(other, word)


def into_metadata(q, r):
    at, _ = some_entry(q, r)
    if not at or external(q):
        return False
    places = [0, q["l1_offset"], q["refcount_table_offset"]] + [t for _, t in q.tables()] + [b for _, b in q.blocks()]
    q.set_word(at, r.choice([p for p in places if p]) | COPIED)


def misaligned(q, r):
    at, word = some_entry(q, r)
    if not at or q.cluster == 512:
        return False
    q.set_word(at, word ^ 512)


def misaligned_zero(q, r):
    at, word = some_entry(q, r)
    if not at or q.cluster == 512 or q["version"] == 2 or q["incompatible"] & 16:
        return False
    q.set_word(at, (word ^ 512) | ZERO)


def beyond_end(q, r):
    at, _ = some_entry(q, r)
    if not at or external(q):
        return False
    end = (q.length() + q.cluster - 1) // q.cluster * q.cluster
    q.set_word(at, end + r.randint(0, 3) * q.cluster | COPIED)


def far_beyond_end(q, r):
    at, _ = some_entry(q, r)
    if not at or external(q):
        return False
    q.set_word(at, (OFFSET & -q.cluster) | COPIED)


def reserved_bits(q, r):
    at, word = some_entry(q, r)
    if not at:
        return False
    q.set_word(at, word | r.choice((2, 0x100, 1 << 57, 1 << 61)))


def l1_reserved_bits(q, r):
    i, _ = r.choice(q.tables())
    q.set_word(q.l1_at(i), q.word(q.l1_at(i)) | r.choice((1, 0x100, 1 << 56, 1 << 60)))


def l1_beyond_end(q, r):
    i, _ = r.choice(q.tables())
    q.set_word(q.l1_at(i), q.length() // q.cluster * q.cluster + 5 * q.cluster | COPIED)


def l1_misaligned(q, r):
    if q.cluster == 512:
        return False
    i, table = r.choice(q.tables())
    q.set_word(q.l1_at(i), table ^ 512 | COPIED)


def table_twice(q, r):
    i, table = r.choice(q.tables())
    j = r.randrange(q["l1_size"])
    if i == j:
        return False
    q.set_word(q.l1_at(j), table | COPIED)


def compressed_copied(q, r):
    at, word = some_entry(q, r, lambda w: True)
    step = 16 if q["incompatible"] & 16 else 8
    if not at or q["version"] == 2 or step == 16 or external(q):
        return False
    q.set_word(at, (word & OFFSET) | COMPRESSED | r.choice((0, COPIED)))


def block_beyond_end(q, r):
    n = q["refcount_table_clusters"] * q.cluster // 8
    q.set_word(q["refcount_table_offset"] + 8 * (n - 1), q.length() // q.cluster * q.cluster + 9 * q.cluster)


def block_is_data(q, r):
    at, word = some_entry(q, r)
    if not at or external(q):
        return False
    n = q["refcount_table_clusters"] * q.cluster // 8
    q.set_word(q["refcount_table_offset"] + 8 * (n - 1), word & OFFSET)


def block_and_data_beyond_end(q, r):
    at, _ = some_entry(q, r)
    if not at or external(q):
        return False
    block_beyond_end(q, r)
    q.set_word(at, q.length() // q.cluster * q.cluster + 9 * q.cluster | COPIED)


def block_gone(q, r):
    i, _ = r.choice(q.blocks())
    q.set_word(q["refcount_table_offset"] + 8 * i, 0)


def block_reserved_bits(q, r):
    i, block = r.choice(q.blocks())
    q.set_word(q["refcount_table_offset"] + 8 * i, block | 1)


def dirty(q, r):
    if q["version"] == 2:
        return False
    q["incompatible"] |= 1
    refcount_zero(q, r)


def subcluster_bits(q, r):
    if q["version"] == 2 or not q["incompatible"] & 16:
        return False
    at, word = some_entry(q, r, lambda w: True)
    if not at:
        return False
    q.set_word(at + 8, r.choice((0x0000000100000001, 0xffffffff00000003)))


def subcluster_no_cluster(q, r):
    if q["version"] == 2 or not q["incompatible"] & 16:
        return False
    at, _ = some_entry(q, r, lambda w: True)
    if not at:
        return False
    q.set_word(at, 0)
    q.set_word(at + 8, 0xff)


def snapshot_l1(q, r):
    if not q["snapshots"]:
        return False
    at = q["snapshots_offset"]
    q.set_word(at, r.choice((q.word(at) + 512, q.length() + 64 * q.cluster, q["l1_offset"])))


def truncated(q, r):
    os.ftruncate(q.file.fileno(), q.length() - r.randint(1, 3) * q.cluster - r.choice((0, 512)))


DAMAGES = [leak, refcount_zero, refcount_too_high, metadata_uncounted, flag_cleared, l1_flag_cleared, used_twice,
           into_metadata, misaligned, misaligned_zero, beyond_end, far_beyond_end, reserved_bits, l1_reserved_bits,
           l1_beyond_end, l1_misaligned, table_twice, compressed_copied, block_beyond_end, block_is_data,
           block_and_data_beyond_end, block_gone, block_reserved_bits, dirty, subcluster_bits, subcluster_no_cluster, snapshot_l1, truncated]
# What a 1-bit refcount cannot say must not be forgotten when refcounts are made anew.
ALWAYS = [(block_gone, block_is_data)]
# Kinds that always get each damage alone.
THOROUGH = {"plain", "small", "bits1", "subclusters"}


# After these, what the guest sees is metadata, which the repair changes; or an entry that means nothing becomes zeroes.
CHANGES = {"into_metadata", "subcluster_bits", "subcluster_no_cluster", "misaligned_zero"}


# --- the comparison -----------------------------------------------------------------------------------------------

class Case:
    def __init__(self, qlean, path, name, loses):
        self.qlean, self.path, self.name, self.loses = qlean, path, name, loses

    def fail(self, text):
        print(f"FAIL: {self.name}: {text}", file=sys.stderr)
        sys.exit(1)

    def qemu(self, *options):
        done = run("qemu-img", "check", "-f", "qcow2", "--output=json", *options, self.path)
        try:
            return done.returncode, json.loads(done.stdout), done.stderr
        except json.JSONDecodeError:
            return done.returncode, None, done.stderr

    def ours(self, *options):
        done = run(self.qlean, "check", "--json", *options, self.path)
        if done.returncode not in (0, 1, 2, 3):
            self.fail(f"qlean check: {done.returncode}: {done.stderr}")
        try:
            return done.returncode, json.loads(done.stdout), done.stderr
        except json.JSONDecodeError:
            return done.returncode, None, done.stderr

    def compare(self, *options):
        code, theirs, said = self.qemu()
        mine_code, mine, mine_said = self.ours(*options)
        if theirs is None or theirs["check-errors"]:
            # QEMU gave up, or went on with what it could not read: its numbers mean nothing.
            if code != 0 and mine_code == 0:
                self.fail(f"qemu-img check ends with {code}: {said}; qlean check finds nothing")
            return mine_code
        if mine is None:
            self.fail(f"qlean check says nothing: {mine_said}; qemu-img check {theirs}")
        for key, name in KEYS.items():
            if theirs.get(key, 0) != mine[name]:
                self.fail(f"{key}: qemu-img says {theirs.get(key, 0)}, qlean {mine[name]}\n{said[:3000]}\n{mine['problems'][:20]}")
        if code != mine_code:
            self.fail(f"exit code {mine_code} instead of {code}")
        return code

    def repair(self):
        """--repair all, judged by qemu-img and by what qemu-img's own repair can do."""
        twin = self.path + ".twin"
        shutil.copyfile(self.path, twin)
        # What QEMU reads of the damaged image, if it reads it at all, is what it reads after the repair.
        raw = ("convert", "-q", "-f", "qcow2", "-O", "raw", self.path)
        readable = run("qemu-img", *raw, self.path + ".before").returncode == 0
        code, mine, said = self.ours("--repair", "all")
        after, _, theirs_said = self.qemu()
        if after != 0:
            run("qemu-img", "check", "-q", "-f", "qcow2", "-r", "all", twin)
            theirs = run("qemu-img", "check", "-q", "-f", "qcow2", twin).returncode
            if theirs == 0:
                self.fail(f"qemu-img can repair it, qlean cannot: {code} {mine} {said}\n{theirs_said}")
            if code == 0:
                self.fail(f"qlean calls it repaired, qemu-img does not: {theirs_said}")
        elif code != 0:
            self.fail(f"qemu-img finds the repaired image clean, qlean check --repair all ends with {code}: {said} {mine}")
        elif readable:
            must("qemu-img", *raw, self.path + ".after")
            if not filecmp.cmp(self.path + ".before", self.path + ".after", shallow=False) and not self.loses:
                self.fail("the disk has other bytes after the repair")
        os.unlink(twin)
        return after == 0


def main():
    qlean, directory = sys.argv[1:3]
    everything = sys.argv[3:] == ["all"]
    seed = int(os.environ.get("QLEAN_SEED", random.randrange(1 << 32)))
    only = os.environ.get("QLEAN_ONLY", "")
    r = random.Random(seed)
    print(f"QLEAN_SEED={seed}")
    cases = repaired = beyond = damaged = 0
    path = os.path.join(directory, "case.qcow2")
    for kind, make in IMAGES.items():
        original = os.path.join(directory, kind + ".qcow2")
        make(original)
        alone = DAMAGES if everything or kind in THOROUGH else r.sample(DAMAGES, 9)
        combined = [tuple(r.sample(DAMAGES, r.randint(2, 4))) for _ in range(12 if everything else 4)]
        sets = [()] + [(d,) for d in alone] + ALWAYS + combined
        for damages in sets:
            shutil.copyfile(original, path)
            with Qcow2(path) as q:
                done = []
                for d in damages:
                    try:
                        if d(q, r) is not False:
                            done.append(d.__name__)
                    except (AssertionError, IndexError):
                        pass # an earlier damage took the place away
            if damages and not done:
                continue
            name = f"{kind}: {', '.join(done) or 'sound'} (QLEAN_SEED={seed})"
            if only and only not in name:
                continue
            case = Case(qlean, path, name, bool(CHANGES & set(done)))
            code = case.compare()
            cases += 1
            damaged += code != 0
            if case.repair():
                repaired += 1
            else:
                beyond += 1
    print(f"{cases} cases, {damaged} with something wrong; {repaired} clean after --repair all, {beyond} beyond repair "
          "for qemu-img too")


main()
