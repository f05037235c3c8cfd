#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# Real servers that are killed: nbdkit with the plugin, half of the time with the reclaim filter, under two connections
# that write, zero, trim and flush, and with a maintainer beside them, ends by SIGKILL or SIGTERM at a random moment:
# serving, while it stops, or while it opens. Every server inherits what the last one left. After SIGTERM the status is 0
# and every acknowledged byte is there; after SIGKILL every flushed one, and the others are old or newer (kill_model.py).
# Every few kills QEMU is the first to open the image: it judges it and writes to it, then the next server serves that.
#
# kills.py COUNT: so many kills, on images of all kinds, two at a time. --seed replays the requests, not the moments.
"""Kills of a real server under a real client while compaction runs."""
import argparse
import collections
import concurrent.futures
import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback

import nbd

from kill_model import Disagreement, Model, same
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "../matrix"))
from images import KIB, MIB, Failed, Image, Recipe, run  # noqa: E402

WRITERS = 2
PIECE = 400 * KIB + 1313  # odd: the writers share clusters and sectors
LIFE = 25                 # kills of one image
SERVER_GONE = 5           # exit status of qlean


@dataclasses.dataclass(frozen=True)
class Disk(Recipe):
    """Large enough that a compaction takes a while."""

    def size(self):
        return max(16 * MIB, 16 * self.cluster) + 1536


KINDS = (Disk(), Disk(cluster=4 * KIB), Disk(extended_l2=True), Disk(compression="zlib", snapshots=1),
         Disk(backing="qcow2"), Disk(data_file="raw"), Disk(cluster=4 * KIB, snapshots=2, compression="zstd"),
         Disk(cluster=512, version=2), Disk(data_file="on"), Disk(luks=True), Disk(cluster=2 * MIB, lazy=True),
         Disk(bitmaps=1, refcount_bits=64), Disk(cluster=16 * KIB, extended_l2=True, backing="raw"))


class Server:
    """One nbdkit. `dying` is set before it is killed: from then on a request may fail."""

    def __init__(self, image, options, reclaim):
        self.socket, self.log = image.file("sock"), image.file("server.log")
        if os.path.exists(self.socket):
            os.unlink(self.socket)
        command = ["nbdkit", "-f", "-U", self.socket] + (["--filter=" + options.filter] if reclaim else [])
        command += [options.plugin, "file=" + image.path]
        if image.recipe.luks:
            command.append("passphrase=+" + image.secret)
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.dying = threading.Event()

    def wait_until_it_serves(self):
        deadline = time.monotonic() + 20
        while self.process.poll() is None and time.monotonic() < deadline:
            try:
                return self.connect()
            except nbd.Error:
                time.sleep(0.002)
        with open(self.log, errors="replace") as log:
            raise Failed(f"the survivor is not served: {log.read().strip()[-400:]}")

    def connect(self, export="", plan=False):
        handle = nbd.NBD()
        handle.set_export_name(export)
        if plan:
            handle.add_meta_context("base:allocation")
        handle.connect_unix(self.socket)
        return handle

    def end(self, *signals):
        """Sends them, 0 to 6 ms apart, and waits. Throws if the server did not end as it must."""
        if self.process.poll() is not None:
            raise Failed(f"the server ended by itself with status {self.process.returncode}")
        self.dying.set()
        for n, which in enumerate(signals):
            if n:
                time.sleep(random.random() * 0.006)
            self.process.send_signal(which)
        status = self.process.wait(30)
        if status != 0 and not (status == -signal.SIGKILL and signal.SIGKILL in signals):
            with open(self.log, errors="replace") as log:
                raise Failed(f"status {status} after {[s.name for s in signals]}: {log.read().strip()[-400:]}")
        return status


class Worker(threading.Thread):
    """A client of one server. Keeps what went wrong before the server was told to die."""

    def __init__(self, server, work, *arguments):
        super().__init__(daemon=True)
        self.server, self.work, self.arguments, self.error = server, work, arguments, None
        self.start()

    def run(self):
        try:
            self.work(self.server, *self.arguments)
        except Exception as error:  # re-raised by finish()
            if not (self.server.dying.is_set() and isinstance(error, nbd.Error)):
                self.error = error

    def finish(self):
        self.join(30)
        if self.error or self.is_alive():
            raise self.error or Failed("a client hangs although its server is gone")


def write(server, model, writer, seed, cluster, reclaim):
    """One connection's guest: random requests, each in a piece of the disk that is its own."""
    rng, handle, size = random.Random(seed), server.connect(), len(model.base)
    pieces = range(writer, (size + PIECE - 1) // PIECE, WRITERS)
    while True:
        start = rng.choice(pieces) * PIECE
        end = min(start + PIECE, size)
        offset = rng.randrange(start, end)
        length = rng.choice((512, 4 * KIB, cluster, 64 * KIB, 256 * KIB))
        if rng.random() < 0.6:
            offset = max(start, offset - offset % min(cluster, 64 * KIB))
        length = min(length, end - offset)
        kind = rng.random()
        if kind < 0.42:
            data, fua = rng.randbytes(length), rng.random() < 0.05
            change = model.begin(writer, offset, length, data)
            handle.pwrite(data, offset, nbd.CMD_FLAG_FUA if fua else 0)
            model.end(change, data, fua)
        elif kind < 0.72:
            change = model.begin(writer, offset, length, None)
            handle.trim(length, offset)
            left, before = bytes(handle.pread(length, offset)), bytes(model.now[offset:offset + length])
            if left not in (before, bytes(length)) and any(have not in (0, was) for have, was in zip(left, before)):
                raise Disagreement(f"a trim of {offset}+{length} brought up bytes that were not there")
            model.end(change, left, loose=reclaim and any(left))
        elif kind < 0.8:
            change = model.begin(writer, offset, length, bytes(length))
            handle.zero(length, offset, rng.choice((0, nbd.CMD_FLAG_NO_HOLE)))
            model.end(change, bytes(length))
        elif kind < 0.95:
            model.expect(bytes(handle.pread(length, offset)), offset, "read")
        else:
            mark = model.mark()
            handle.flush()
            model.flushed(mark)


class Maintainer:
    """Compacts and looks for zeroes, over the protocol; `doing` says what the server is asked to do just now."""

    def __init__(self):
        self.doing = None

    def work(self, server):
        size = server.connect().get_size()
        for turn in range(1 << 30):
            handle = server.connect("zeroes" if turn % 4 == 3 else "compact", plan=True)
            try:
                self.pass_over(handle, size)
            except nbd.Error as error:
                if error.errno != "EPERM" or server.dying.is_set():
                    raise
                # The server has not seen yet that the connection before has gone, and that one owns the moves.
            handle.shutdown()

    def pass_over(self, handle, size):
        for _ in range(3):
            todo = self.plan(handle, size)
            for offset, length in todo:
                self.ask("moving", lambda: handle.cache(length, offset))  # pylint: disable=cell-var-from-loop
            self.ask("committing" if todo else None, handle.flush)

    def ask(self, what, request):
        self.doing = what
        request()
        self.doing = None

    @staticmethod
    def plan(handle, size):
        todo, at = [], 0

        def add(_context, offset, entries, _error):
            nonlocal at
            at = offset
            for length, flags in zip(entries[::2], entries[1::2]):
                if flags == 0:
                    todo.extend((o, min(MIB, at + length - o)) for o in range(at, at + length, MIB))
                at += length
        while at < size:
            handle.block_status(size - at, at, add)
        return todo


class Qlean:
    """The same by the command; killed with its server, it must say that the server is gone."""

    def __init__(self, qlean):
        self.qlean, self.doing = qlean, None

    def work(self, server):
        while not server.dying.is_set():
            self.doing = "qlean"
            done = subprocess.run([self.qlean, "compact", "-q", "--fast", server.socket], capture_output=True, text=True,
                                  timeout=30, check=False)
            self.doing = None
            if done.returncode not in ((0, 1, SERVER_GONE) if server.dying.is_set() else (0,)):
                raise Failed(f"qlean compact: status {done.returncode}: {done.stderr.strip()}")
            if done.returncode and done.stderr.count("\n") != 1:
                raise Failed(f"qlean compact says not one sentence but: {done.stderr.strip()}")


class Life:
    """One image, killed again and again."""

    def __init__(self, recipe, count, seed, options):
        self.options, self.count, self.random = options, count, random.Random(f"{recipe} {seed}")
        self.image = Image(recipe, tempfile.mkdtemp(prefix="k.", dir=options.directory), seed)
        self.counts = collections.Counter()
        self.leaks = False  # a SIGKILL may have left some
        self.orderly = True  # how the last server ended
        self.unsure = bytearray(self.image.size)  # of a raw data file: a lost entry may leave its data there

    def live(self):
        self.image.make()
        self.model = Model(self.image.contents(), WRITERS)
        for turn in range(self.count):
            self.kill(turn)
            if turn % 5 == 4 or turn == self.count - 1:
                self.judge()
                self.qemu_writes()
        run(self.options.qlean, "compact", "-q", *self.key(), self.image.path)
        self.image.check()  # not even a leak
        same(self.image.contents(), bytes(self.model.base), "after the last compaction")
        shutil.rmtree(self.image.directory)
        return self.counts

    def key(self):
        return ["--passphrase-file", self.image.secret] if self.image.recipe.luks else []

    def kill(self, turn):
        reclaim = turn % 2 == 1
        if self.random.random() < 0.1:  # while it opens; the next one finds what that left
            server = Server(self.image, self.options, reclaim)
            time.sleep(random.random() * 0.04)
            server.end(signal.SIGKILL)
            self.counts["opening"] += 1
            self.leaks = True
            return
        server = Server(self.image, self.options, reclaim)
        handle = server.wait_until_it_serves()
        size = self.image.size
        self.accept(b"".join(bytes(handle.pread(min(4 * MIB, size - at), at)) for at in range(0, size, 4 * MIB)), "served")
        maintainer = Qlean(self.options.qlean) if turn % 4 == 2 else Maintainer()
        workers = [Worker(server, write, self.model, n, self.random.random(), self.image.recipe.cluster, reclaim)
                   for n in range(WRITERS)]
        workers.append(Worker(server, maintainer.work))
        time.sleep(0.05 + self.random.random() * 0.2)
        if self.random.random() < 0.5:  # half of the kills aim at maintenance, at any moment of a request
            deadline = time.monotonic() + 0.3
            while maintainer.doing is None and time.monotonic() < deadline:
                time.sleep(0.0005)
            time.sleep(self.random.random() * 0.003)
        signals = self.random.choice(([signal.SIGKILL], [signal.SIGTERM], [signal.SIGKILL], [signal.SIGTERM, signal.SIGKILL]))
        doing = maintainer.doing
        status = server.end(*signals)
        for worker in workers:
            worker.finish()
        self.orderly = status == 0
        self.leaks = self.leaks or not self.orderly
        self.counts["SIGTERM" if self.orderly else "while stopping" if len(signals) > 1 else "SIGKILL"] += 1
        self.counts[doing] += 1
        self.counts["unflushed"] += self.model.unflushed()

    def accept(self, have, by):
        """Whoever reads the survivor first decides which of its values an unflushed byte has from now on."""
        for change in () if self.orderly else (c for log in self.model.logs for c in log):
            self.unsure[change.offset:change.end] = b"\1" * (change.end - change.offset)
        self.model.settle(have, self.orderly, f"{by} after {'SIGTERM' if self.orderly else 'SIGKILL'}")

    def judge(self):
        """QEMU finds no corruption, no leak unless there was a SIGKILL, and the same bytes, in snapshots too."""
        run("qemu-img", "check", *self.image.options(), allow=(0, 3) if self.leaks else (0,))
        self.accept(self.image.contents(), "read by QEMU")
        for name, contents in self.image.snapshots.items():
            same(self.image.contents(name), contents, f"{name} read by QEMU")
        if self.image.recipe.data_file == "raw":
            with open(self.image.file("data.raw"), "rb") as data:
                raw = data.read(self.image.size)
            want = bytes(r if unsure else b for r, unsure, b in zip(raw, self.unsure, self.model.base))
            same(raw, want, "the raw data file")
        self.counts["judged"] += 1

    def qemu_writes(self):
        commands = []
        for _ in range(6):
            length = self.random.choice((512, 4 * KIB, 64 * KIB))
            offset = self.random.randrange(self.image.size - length) & ~511
            value = self.random.choice((0, self.random.randrange(1, 256)))
            commands.append(f"write -P {value} {offset} {length}" if value else f"write -z {offset} {length}")
            self.model.base[offset:offset + length] = bytes([value]) * length
        self.image.io(commands)
        self.model = Model(self.model.base, WRITERS)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    build = os.environ.get("QLEAN_BUILD", "build")
    parser.add_argument("count", type=int)
    parser.add_argument("--plugin", default=os.path.join(build, "plugin/nbdkit-qcow2-plugin.so"))
    parser.add_argument("--filter", default=os.path.join(build, "filter/nbdkit-reclaim-filter.so"))
    parser.add_argument("--qlean", default=os.path.join(build, "client/qlean"))
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--only", default="", help="only images whose description contains this")
    parser.add_argument("--keep", action="store_true", help="keep the images of what failed")
    options = parser.parse_args()
    options.directory = tempfile.mkdtemp(prefix="qlean-kills.")
    kinds = [k for k in KINDS if options.only in str(k)]
    life = max(1, min(LIFE, options.count // len(kinds)))
    total, failures, left = collections.Counter(), 0, options.count
    # Processes: Python's threads of one life are enough for one processor.
    with concurrent.futures.ProcessPoolExecutor(2) as pool:
        futures = []
        while left > 0:
            recipe, seed = kinds[len(futures) % len(kinds)], options.seed + len(futures) // len(kinds)
            futures.append((recipe, seed, pool.submit(one, recipe, min(life, left), seed, options)))
            left -= life
        for recipe, seed, future in futures:
            counts, error = future.result()
            total += counts
            if error:
                failures += 1
                print(f"FAIL: {recipe}, seed {seed}: {error}", flush=True)
    if not (options.keep and failures):
        shutil.rmtree(options.directory, ignore_errors=True)
    kills = sum(total[k] for k in ("SIGKILL", "SIGTERM", "while stopping", "opening"))
    inside = sum(total[k] for k in ("moving", "committing", "qlean"))
    print(f"{kills} kills ({total['SIGKILL']} SIGKILL, {total['SIGTERM']} SIGTERM, {total['while stopping']} SIGKILL while "
          f"stopping, {total['opening']} SIGKILL while opening), {inside} in the middle of maintenance ({total['moving']} "
          f"moving, {total['committing']} committing, {total['qlean']} of qlean), {total['unflushed']} changes not flushed, "
          f"{total['judged']} judged by QEMU, {failures} failures (--seed {options.seed})")
    if not failures and inside * 10 < kills * 3:
        print("FAIL: fewer than 30 % of the kills met maintenance at work")
        failures = 1
    return 1 if failures else 0


def one(recipe, count, seed, options):
    life = Life(recipe, count, seed, options)
    try:
        life.live()
        return life.counts, None
    except (Failed, Disagreement, nbd.Error, subprocess.TimeoutExpired) as error:
        return life.counts, f"{error}"
    except Exception:  # a defect of the test itself
        return life.counts, traceback.format_exc()


if __name__ == "__main__":
    sys.exit(main())
