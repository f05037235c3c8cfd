#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# A guest made of random requests. It owns a raw model file of the disk's size and keeps one invariant: every byte
# the disk returns is the model's. Each request may have any alignment. Connections work in parallel on interleaved
# pieces of the disk, which share clusters at their edges. A TRIM may leave each byte or zero it: what it left is
# read back once and must stay. Any error from the disk fails the run. The seed is printed: it replays the requests.
"""Random guest I/O against an NBD export, checked against a raw model file."""
import argparse
import mmap
import os
import random
import sys
import threading
import time

import nbd

PIECE = (1 << 20) + 6245  # odd: neighbours share clusters, subclusters and sectors


class Disagreement(Exception):
    pass


class Connection:
    """One connection and the pieces of the disk that it alone writes to."""

    def __init__(self, number, options, model, size):
        self.number, self.options, self.model, self.size = number, options, model, size
        self.random = random.Random(options.seed * 1000 + number)
        self.requests = 0
        self.unflushed = []  # (offset, bytes before): what a killed server may have forgotten
        self.kills_at_flush = kills(options)
        self.handle = nbd.NBD()
        self.handle.connect_uri(options.uri)
        self.pieces = range(number, (size + PIECE - 1) // PIECE, options.connections)
        self.error = None

    def pick(self):
        """A range of random length and alignment inside one of this connection's pieces."""
        start = self.random.choice(self.pieces) * PIECE
        end = min(start + PIECE, self.size)
        length = min(self.random.choice((512, 4096, 65536, self.options.largest)), self.options.largest)
        length = self.random.randint(1, length)
        offset = self.random.randrange(start, end)
        if self.random.random() < 0.5:  # half of the requests aligned as a file system's are
            offset = max(start, offset & ~4095)
            length = (length + 4095) & ~4095
        return offset, min(length, end - offset)

    def expect(self, offset, data, what):
        want = self.model[offset:offset + len(data)]
        if data != want:
            at = next(i for i in range(len(data)) if data[i] != want[i])
            raise Disagreement(f"{what}: byte {offset + at} is {data[at]:#x}, the model has {want[at]:#x} "
                               f"(seed {self.options.seed}, connection {self.number}, request {self.requests})")

    def change(self, offset, data):
        if self.options.kills:
            self.unflushed.append((offset, self.model[offset:offset + len(data)]))
        self.model[offset:offset + len(data)] = data

    def write(self):
        offset, length = self.pick()
        data = self.random.randbytes(length) if self.random.random() < 0.9 else bytes(length)
        fua = self.random.random() < 0.05
        self.handle.pwrite(data, offset, nbd.CMD_FLAG_FUA if fua else 0)
        self.change(offset, data)

    def zero(self):
        offset, length = self.pick()
        self.handle.zero(length, offset, self.random.choice((0, nbd.CMD_FLAG_NO_HOLE)))
        self.change(offset, bytes(length))

    def trim(self):
        offset, length = self.pick()
        self.handle.trim(length, offset)
        left = bytes(self.handle.pread(length, offset))
        before = self.model[offset:offset + length]
        plain = left in (before, bytes(length)) or self.killed()
        for i in () if plain else range(length):
            if left[i] not in (0, before[i]):
                raise Disagreement(f"trim of {offset}+{length} left byte {offset + i} neither zero nor as it was")
        self.change(offset, left)

    def read(self):
        offset, length = self.pick()
        data = bytes(self.handle.pread(length, offset))
        if data != self.model[offset:offset + length] and self.killed():
            self.flush()
            data = bytes(self.handle.pread(length, offset))
        self.expect(offset, data, "read")

    def killed(self):
        """Whether a server may have been killed since the last flush."""
        now = kills(self.options)
        return now != self.kills_at_flush or now % 2 == 1

    def flush(self):
        self.handle.flush()
        if self.killed():
            self.settle()
        self.unflushed.clear()
        self.kills_at_flush = kills(self.options)

    def settle(self):
        """After a kill an unflushed byte may have any value it had since the last flush."""
        for offset, changed in self.unflushed:
            length = len(changed)
            have = bytes(self.handle.pread(length, offset))
            for i in range(length):
                at = offset + i
                allowed = {self.model[at]} | {b[at - o] for o, b in self.unflushed if o <= at < o + len(b)}
                if have[i] not in allowed:
                    raise Disagreement(f"byte {at} has a value that it never had since the last flush before a kill")
            self.model[offset:offset + length] = have

    def run(self):
        verbs = [self.write] * 10 + [self.read] * 6 + [self.trim] * self.options.trims + [self.zero] * 2 + [self.flush]
        end = time.monotonic() + self.options.seconds
        try:
            while self.requests < self.options.requests and time.monotonic() < end:
                if self.options.until and os.path.exists(self.options.until):
                    break
                if self.options.kills and len(self.unflushed) >= 8:
                    self.flush()
                self.random.choice(verbs)()
                self.requests += 1
                if self.requests == 1 and self.options.started:
                    open(self.options.started, "a", encoding="utf-8").close()
                if self.options.pause:
                    time.sleep(self.options.pause)
            self.flush()
        except Exception as error:  # reported by main: a thread's own traceback would not fail the run
            self.error = error


def kills(options):
    """A counter that the killer raises before and after each kill: odd means that one is under way."""
    return os.path.getsize(options.kills) if options.kills else 0


def verify(connection):
    for offset in range(0, connection.size, 4 << 20):
        length = min(4 << 20, connection.size - offset)
        connection.expect(offset, bytes(connection.handle.pread(length, offset)), "final read")


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--uri", required=True)
    p.add_argument("--model", required=True, help="raw file; created all zero when it does not exist")
    p.add_argument("--seconds", type=float, default=600)
    p.add_argument("--requests", type=int, default=1 << 60, help="of each connection")
    p.add_argument("--until", help="stop when this file exists")
    p.add_argument("--started", help="make this file after the first request")
    p.add_argument("--kills", help="file whose size counts the kills, see kills()")
    p.add_argument("--connections", type=int, default=1)
    p.add_argument("--largest", type=int, default=1 << 20, help="bytes of one request")
    p.add_argument("--trims", type=int, default=3, help="weight of TRIM, 0 for none")
    p.add_argument("--pause", type=float, default=0, help="seconds between requests")
    p.add_argument("--seed", type=int, default=int(os.environ.get("QLEAN_SEED", random.SystemRandom().getrandbits(32))))
    options = p.parse_args()

    probe = nbd.NBD()
    probe.connect_uri(options.uri)
    size = probe.get_size()
    probe.shutdown()
    if not os.path.exists(options.model):
        with open(options.model, "wb") as f:
            f.truncate(size)
    with open(options.model, "r+b") as f, mmap.mmap(f.fileno(), size) as model:
        connections = [Connection(i, options, model, size) for i in range(options.connections)]
        threads = [threading.Thread(target=c.run) for c in connections]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        errors = [c.error for c in connections if c.error]
        if not errors:
            try:
                verify(connections[0])
            except (Disagreement, nbd.Error) as error:
                errors.append(error)
        for error in errors:
            print(f"guest_io: {error}", file=sys.stderr)
        if not errors:
            for c in connections:
                c.handle.shutdown()
    done = [c.requests for c in connections]
    print(f"guest_io: {sum(done)} requests on {len(done)} connections, seed {options.seed}, {len(errors)} errors")
    if not min(done):
        print("guest_io: a connection made no request", file=sys.stderr)
    return 1 if errors or not min(done) else 0


sys.exit(main())
