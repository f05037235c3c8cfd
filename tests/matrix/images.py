# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# Images of every kind, made by QEMU's own tools. A Recipe says what an image is; make() makes it, and the rest of this
# file talks to QEMU about it: reading the guest's bytes, checking, writing again. Nothing here knows qlean.
"""Recipes for QCOW2 images, and QEMU's view of them."""
import dataclasses
import json
import os
import random
import subprocess

KIB, MIB = 1 << 10, 1 << 20
PASSPHRASE = "open-sesame"


class Failed(Exception):
    pass


def run(*command, allow=(0,), timeout=300):
    """Runs a command, gives its standard output; what it says on standard error belongs to the failure."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode not in allow:
        raise Failed(f"{' '.join(map(str, command))}: status {done.returncode}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What an image is made of; every field has the value that QEMU takes by itself."""
    cluster: int = 64 * KIB
    version: int = 3
    refcount_bits: int = 16
    compression: str = ""       # "", "zlib", "zstd": part of the clusters are compressed
    extended_l2: bool = False
    backing: str = ""           # "", raw, qcow2, deep, short, json, compressed, snapshots
    data_file: str = ""         # "", "on", "raw"
    snapshots: int = 0
    bitmaps: int = 0            # the first is enabled, the second is not
    luks: bool = False
    lazy: bool = False
    preallocation: str = "off"
    writer: str = "qemu-io"     # or qemu-img: the contents come from `qemu-img convert`

    def __str__(self):
        default = Recipe()
        changed = [f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self)
                   if getattr(self, f.name) != getattr(default, f.name)]
        return " ".join(changed) or "plain"

    def values(self):
        """Its options, each with its value."""
        return set(dataclasses.asdict(self).items())

    def possible(self):
        """Whether QEMU can make it."""
        v3 = (self.refcount_bits != 16 or self.extended_l2 or self.data_file or self.bitmaps or self.lazy
              or self.compression == "zstd")
        return not any((
            self.version == 2 and v3,
            self.extended_l2 and self.cluster < 16 * KIB,
            self.data_file and (self.snapshots or self.compression or self.luks),
            self.data_file == "raw" and self.backing,
            self.preallocation != "off" and self.backing and not self.extended_l2,
            self.preallocation != "off" and (self.backing or self.data_file == "raw"),
            self.preallocation in ("falloc", "full") and self.data_file,
            self.compression and (self.luks or self.preallocation != "off"),
            self.snapshots + 1 >= 1 << self.refcount_bits,
            self.writer == "qemu-img" and (self.backing or self.preallocation != "off"),
            self.luks and self.cluster < 4 * KIB,
        ))

    def size(self):
        """Bytes of the disk: not a multiple of anything, and small enough for small clusters."""
        return {512: 1 * MIB, 4 * KIB: 4 * MIB}.get(self.cluster, 8 * MIB if self.cluster < MIB else 24 * MIB) + 1536


class Image:
    """One image in a directory of its own."""

    def __init__(self, recipe, directory, seed):
        self.recipe, self.directory, self.size = recipe, directory, recipe.size()
        self.path = os.path.join(directory, "disk.qcow2")
        self.random = random.Random(f"{recipe} {seed}")
        self.snapshots = {}  # name: the guest's bytes at that time
        self.secret = os.path.join(directory, "passphrase")
        with open(self.secret, "w", encoding="ascii") as out:
            out.write(PASSPHRASE)

    def file(self, name):
        return os.path.join(self.directory, name)

    # --- QEMU's view ----------------------------------------------------------------------------------------------

    def options(self, path=None):
        """What names the image to a QEMU tool, with its key if it has one."""
        path = path or self.path
        if not self.recipe.luks:
            return ["-f", "qcow2", path]
        return ["--object", f"secret,id=k,file={self.secret}",
                "--image-opts", f"driver=qcow2,encrypt.format=luks,encrypt.key-secret=k,file.filename={path}"]

    def contents(self, snapshot=None):
        """The guest's bytes, as QEMU reads them."""
        out = self.file("contents.raw")
        extra = ["-l", snapshot] if snapshot else []
        run("qemu-img", "convert", *extra, "-O", "raw", *self.options(), out)
        with open(out, "rb") as data:
            return data.read()

    def info(self):
        return json.loads(run("qemu-img", "info", "--output=json", *self.options()))

    def check(self):
        """Throws unless `qemu-img check` finds nothing at all."""
        arguments = self.options()
        run("qemu-img", "check", *arguments)

    def io(self, commands):
        arguments = []
        for command in commands:
            arguments += ["-c", command]
        out = run("qemu-io", "-d", "unmap", *self.options(), *arguments)
        if "failed" in out:
            raise Failed(f"qemu-io: {out.strip()}")

    # --- making ---------------------------------------------------------------------------------------------------

    def compressed_writes(self, requests):
        """Compressed clusters, each where nothing is yet: QEMU writes them nowhere else."""
        cluster = self.recipe.cluster
        clusters = self.random.sample(range(self.size // cluster), min(requests, self.size // cluster))
        return [f"write -c -P {self.random.randrange(1, 256)} {c * cluster} {cluster}" for c in clusters]

    def scribble(self, requests):
        """Random requests by qemu-io, as text."""
        cluster, commands = self.recipe.cluster, []
        for _ in range(requests):
            kind = self.random.random()
            length = self.random.choice((512, 4096, cluster, 3 * cluster, 100 * KIB))
            offset = self.random.randrange(0, self.size - 512) & ~511
            if self.random.random() < 0.5:
                offset -= offset % cluster
            length = max(512, min(length, self.size - offset) & ~511)
            if kind < 0.7:
                commands.append(f"write -P {self.random.randrange(1, 256)} {offset} {length}")
            elif kind < 0.8:
                commands.append(f"write -z {offset} {length}")
            elif kind < 0.9:
                commands.append(f"write -z -u {offset} {length}")
            else:
                commands.append(f"discard {offset} {length}")
        return commands

    def pattern(self, name, size):
        """A raw file with data, repetitive data and holes."""
        path = self.file(name)
        with open(path, "wb") as out:
            out.truncate(size)
            for offset in range(0, size, 64 * KIB):
                kind, n = self.random.random(), min(64 * KIB, size - offset)
                if kind < 0.6:
                    out.seek(offset)
                    out.write(self.random.randbytes(n) if kind < 0.3 else bytes([self.random.randrange(1, 256)]) * n)
        return path

    def make_backing(self):
        kind = self.recipe.backing
        size = self.size // 2 - 512 if kind == "short" else self.size
        raw = self.pattern("base.raw", size)
        if kind in ("raw", "short"):
            return ["-b", "base.raw", "-F", "raw"]
        compress = ["-c"] if kind == "compressed" else []
        run("qemu-img", "convert", *compress, "-f", "raw", "-O", "qcow2", raw, self.file("base.qcow2"))
        if kind == "snapshots":  # what the disk has now is what counts
            for name in ("one", "two"):
                run("qemu-img", "snapshot", "-c", name, self.file("base.qcow2"))
                run("qemu-io", "-f", "qcow2", "-c", f"write -P 99 {size // 5 & ~511} 300k", "-c", "discard 128k 64k",
                    self.file("base.qcow2"))
        if kind == "json":
            name = {"driver": "qcow2", "file": {"driver": "file", "filename": self.file("base.qcow2")}}
            return ["-b", "json:" + json.dumps(name), "-F", "qcow2"]
        if kind != "deep":
            return ["-b", "base.qcow2", "-F", "qcow2"]
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", self.file("middle.qcow2"))
        run("qemu-io", "-f", "qcow2", "-c", f"write -P 77 {self.size // 3 & ~511} 200k", "-c", "write -z 0 64k",
            self.file("middle.qcow2"))
        return ["-b", "middle.qcow2", "-F", "qcow2"]

    def create_options(self):
        r = self.recipe
        options = [f"cluster_size={r.cluster}", f"compat={'1.1' if r.version == 3 else '0.10'}"]
        if r.refcount_bits != 16:
            options.append(f"refcount_bits={r.refcount_bits}")
        if r.compression == "zstd":
            options.append("compression_type=zstd")
        if r.extended_l2:
            options.append("extended_l2=on")
        if r.data_file:
            options.append(f"data_file={self.file('data.raw')}")
            options.append(f"data_file_raw={'on' if r.data_file == 'raw' else 'off'}")
        if r.lazy:
            options.append("lazy_refcounts=on")
        if r.preallocation != "off":
            options.append(f"preallocation={r.preallocation}")
        if r.luks:
            options += ["encrypt.format=luks", "encrypt.key-secret=k", "encrypt.iter-time=10"]
        return ["-o", ",".join(options)]

    def secret_object(self):
        return ["--object", f"secret,id=k,file={self.secret}"] if self.recipe.luks else []

    def make(self):
        r = self.recipe
        backing = self.make_backing() if r.backing else []
        if r.writer == "qemu-img":
            source = self.pattern("source.raw", self.size)
            command = ["qemu-img", "convert", *self.secret_object(), *(["-c"] if r.compression else []),
                       "-f", "raw", "-O", "qcow2", *self.create_options(), source, self.path]
        else:
            command = ["qemu-img", "create", "-q", *self.secret_object(), "-f", "qcow2", *self.create_options(),
                       *backing, self.path, str(self.size)]
        # qemu-img measures the processor for the cost of a LUKS key, and gives up by chance on a coarse clock.
        for left in range(40 if r.luks else 1, 0, -1):
            try:
                run(*command)
                break
            except Failed:
                if left == 1:
                    raise
        for n in range(r.bitmaps):
            run("qemu-img", "bitmap", "--add", *(["--disable"] if n else []), "-g", "4096", *self.options(), f"bitmap{n}")
        if r.compression and r.writer == "qemu-io":
            self.io(self.compressed_writes(40))
        self.io(self.scribble(12))
        for n in range(r.snapshots):
            name = f"snapshot{n}"
            self.snapshots[name] = self.contents()
            run("qemu-img", "snapshot", "-c", name, *(self.options() if r.luks else [self.path]))
            self.io(self.scribble(8))
        self.check()


def recipes(full):
    """Every option by itself with every kind of cluster size, then pairs of options."""
    clusters = (512, 4 * KIB, 64 * KIB, 2 * MIB)
    single = ([{}] + [{"refcount_bits": b} for b in (1, 2, 4, 8, 32, 64)] + [{"compression": c} for c in ("zlib", "zstd")]
              + [{"extended_l2": True}] + [{"backing": b} for b in ("raw", "qcow2", "deep", "short", "json", "compressed", "snapshots")]
              + [{"data_file": d} for d in ("on", "raw")] + [{"snapshots": n} for n in (1, 3)]
              + [{"bitmaps": n} for n in (1, 2)] + [{"luks": True}, {"lazy": True}, {"version": 2}]
              + [{"preallocation": p} for p in ("metadata", "falloc", "full")] + [{"writer": "qemu-img"}])
    seen = {}
    for cluster in clusters:
        for options in single:
            if options.get("extended_l2") and cluster < 16 * KIB:
                continue
            seen.setdefault(Recipe(cluster=cluster, **options))
    seen.setdefault(Recipe(cluster=16 * KIB, extended_l2=True))
    for i, first in enumerate(single):
        for second in single[i + 1:]:
            if set(first) & set(second) or not first:
                continue
            for cluster in clusters if full else (64 * KIB,):
                seen.setdefault(Recipe(cluster=cluster, **{**first, **second}))
    return [r for r in seen if r.possible()]
