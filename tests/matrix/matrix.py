#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# The matrix: images of every kind, each in five states: as opened, after random guest I/O through the server, after
# `zeroes` and `compact`, after QEMU has written to it again, and served once more. In each state the guest's bytes are
# the model's, for QEMU and for us, its snapshots are what they were, and `qemu-img check` finds nothing.
"""Every kind of QCOW2 image through the whole path."""
import argparse
import concurrent.futures
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback

import nbd

import images
from images import Failed, Image, run

KIB = images.KIB


class Server:
    """nbdkit with the plugin on a socket, until the block ends."""

    def __init__(self, image, options, *extra):
        self.image, self.options, self.extra = image, options, extra
        self.socket = image.file("sock")
        self.log = image.file("server.log")

    def __enter__(self):
        arguments = ["nbdkit", "-f", "-U", self.socket, self.options.plugin, f"file={self.image.path}", *self.extra]
        if self.image.recipe.luks:
            arguments.append(f"passphrase=+{self.image.secret}")
        if os.path.exists(self.socket):
            os.unlink(self.socket)
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + 20
        while True:
            try:
                self.connect("status")
                return self
            except nbd.Error:
                if self.process.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.005)
                    continue
            self.process.kill()
            self.process.wait()
            with open(self.log, errors="replace") as log:
                raise Failed(f"not served: {log.read().strip()[-400:]}")

    def __exit__(self, kind, *_):
        self.process.terminate()
        status = self.process.wait(60)
        if kind is None and status != 0:
            with open(self.log, errors="replace") as log:
                raise Failed(f"the server ended with status {status}: {log.read().strip()[-400:]}")

    def connect(self, export=""):
        handle = nbd.NBD()
        handle.set_export_name(export)
        handle.connect_unix(self.socket)
        return handle


def read_all(handle, size):
    if handle.get_size() != size:
        raise Failed(f"the export has {handle.get_size()} bytes, not {size}")
    step = 1 << 20
    return b"".join(bytes(handle.pread(min(step, size - at), at)) for at in range(0, size, step))


def same(have, want, what):
    if have != want:
        at = next((i for i, (a, b) in enumerate(zip(have, want)) if a != b), min(len(have), len(want)))
        raise Failed(f"{what}: byte {at} differs ({have[at:at + 1].hex()} instead of {want[at:at + 1].hex()})")


class Guest:
    """Random requests against the model."""

    def __init__(self, handle, model, rng, cluster):
        self.handle, self.model, self.random, self.cluster = handle, model, rng, cluster

    def request(self):
        size = len(self.model)
        length = self.random.choice((1, 512, 4096, self.cluster // 32 or 1, self.cluster, 3 * self.cluster + 700))
        length = min(length, 256 * KIB + 700)
        offset = self.random.randrange(size)
        if self.random.random() < 0.4:
            offset -= offset % self.random.choice((512, 4096, self.cluster))
        length = min(length, size - offset)
        kind = self.random.random()
        if kind < 0.45:
            data = self.random.randbytes(length) if self.random.random() < 0.8 else bytes(length)
            self.handle.pwrite(data, offset, nbd.CMD_FLAG_FUA if self.random.random() < 0.1 else 0)
            self.model[offset:offset + length] = data
        elif kind < 0.6:
            self.handle.zero(length, offset, self.random.choice((0, nbd.CMD_FLAG_NO_HOLE)))
            self.model[offset:offset + length] = bytes(length)
        elif kind < 0.75:
            self.handle.trim(length, offset)
            left, before = bytes(self.handle.pread(length, offset)), self.model[offset:offset + length]
            if any(have not in (0, was) for have, was in zip(left, before)):
                raise Failed(f"a trim of {offset}+{length} brought up bytes that were not there")
            self.model[offset:offset + length] = left
        elif kind < 0.95:
            same(bytes(self.handle.pread(length, offset)), self.model[offset:offset + length], f"reading {offset}+{length}")
        else:
            self.handle.flush()


def judge(image, model, state):
    """QEMU's verdict."""
    try:
        image.check()
    except Failed as error:
        raise Failed(f"{state}: {error}") from None
    same(image.contents(), bytes(model), f"{state}, read by QEMU")
    for name, contents in image.snapshots.items():
        same(image.contents(name), contents, f"{state}, {name} read by QEMU")
    if image.recipe.data_file == "raw":
        with open(image.file("data.raw"), "rb") as data:
            same(data.read(len(model)), bytes(model), f"{state}, the raw data file")


def served(image, model, options, state):
    """What the server gives out: the disk and its snapshots."""
    with Server(image, options) as server:
        same(read_all(server.connect(), image.size), bytes(model), f"{state}, served")
        for name, contents in image.snapshots.items():
            same(read_all(server.connect(f"snapshot/{name}"), len(contents)), contents, f"{state}, {name} served")


def play(recipe, options):
    """One image through all states. Returns the number of states that were judged."""
    directory = tempfile.mkdtemp(prefix="m.", dir=options.directory)
    try:
        image = Image(recipe, directory, options.seed)
        image.make()
        model = bytearray(image.contents())
        served(image, model, options, "as opened")
        judge(image, model, "as opened")

        rng = random.Random(f"{recipe} {options.seed} guest")
        with Server(image, options) as server:
            handle = server.connect()
            guest = Guest(handle, model, rng, recipe.cluster)
            for _ in range(options.requests):
                guest.request()
            same(read_all(handle, image.size), bytes(model), "after guest I/O, served")
            handle.shutdown()
        judge(image, model, "after guest I/O")

        with Server(image, options) as server:
            run(options.qlean, "compact", "-q", server.socket)
            same(read_all(server.connect(), image.size), bytes(model), "after compact, served")
        judge(image, model, "after compact")

        image.io(image.scribble(10))
        model = bytearray(image.contents())
        judge(image, model, "after QEMU wrote again")
        served(image, model, options, "after QEMU wrote again")
        return 5
    finally:
        if not options.keep:
            shutil.rmtree(directory)


def some(recipes, options):
    """A random share of them, in which every value of every option is."""
    rng = random.Random(options.seed)
    chosen = [r for r in recipes if rng.random() < options.share]
    missing = set().union(*(r.values() for r in recipes)).difference(*(r.values() for r in chosen))
    for recipe in rng.sample(recipes, len(recipes)):
        if recipe.values() & missing:
            chosen.append(recipe)
            missing -= recipe.values()
    return chosen


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    build = os.environ.get("QLEAN_BUILD", "build")
    parser.add_argument("--plugin", default=os.path.join(build, "plugin/nbdkit-qcow2-plugin.so"))
    parser.add_argument("--qlean", default=os.path.join(build, "client/qlean"))
    parser.add_argument("--full", action="store_true", help="every pair of options with every cluster size")
    parser.add_argument("--share", type=float, default=1.0, help="play only this share of the images, chosen by the seed")
    parser.add_argument("--only", default="", help="play only recipes whose text contains this")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--requests", type=int, default=120)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--keep", action="store_true", help="keep the images")
    options = parser.parse_args()
    options.seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1 << 32)
    options.directory = tempfile.mkdtemp(prefix="qlean-matrix.")
    chosen = some([r for r in images.recipes(options.full) if options.only in str(r)], options)
    states, failures = 0, []
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for recipe, future in [(r, pool.submit(play, r, options)) for r in chosen]:
            try:
                states += future.result()
            except (Failed, nbd.Error, subprocess.TimeoutExpired) as error:
                failures.append(recipe)
                print(f"FAIL: {recipe}: {error}", flush=True)
            except Exception:  # a defect of the test itself
                failures.append(recipe)
                print(f"FAIL: {recipe}: {traceback.format_exc()}", flush=True)
    if not options.keep:
        shutil.rmtree(options.directory, ignore_errors=True)
    print(f"{len(chosen)} images, {states} states judged, {len(failures)} images failed (--seed {options.seed})")
    return 1 if failures or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
