# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# What a disk may hold after its server was killed. Owns the bytes that are durable and, for each writer, the changes
# that no finished flush covers, in order. Writers change disjoint parts of the disk. A byte may then have the value that
# is durable, or any that was written to it since: nothing older, nothing else. Only where a discard left bytes under the
# reclaim filter (`loose`) they may become zeroes later, when the cluster is freed.
"""A model of a disk that knows what was flushed."""
import threading


class Disagreement(Exception):
    pass


class Change:
    """A change that was sent. `data` is None while a trim's result was not read back: each byte stays, or is zero."""

    def __init__(self, offset, length, data):
        self.offset, self.end, self.data = offset, offset + length, data
        self.acknowledged = False
        self.durable = False  # by itself, with FUA
        self.loose = False


class Model:
    def __init__(self, contents, writers):
        self.base = bytearray(contents)
        self.now = bytearray(contents)  # what a server that lives must return
        self.loose_base, self.loose_now = bytearray(len(contents)), bytearray(len(contents))
        self.logs = [[] for _ in range(writers)]
        self.folded = [0] * writers  # so many changes of each writer are in base
        self.lock = threading.Lock()

    # --- while the server lives -----------------------------------------------------------------------------------

    def begin(self, writer, offset, length, data):
        change = Change(offset, length, data)
        self.logs[writer].append(change)
        return change

    def end(self, change, data, durable=False, loose=False):
        """Acknowledged, and known to have left these bytes."""
        self.now[change.offset:change.end] = data
        self.loose_now[change.offset:change.end] = (b"\1" if loose else b"\0") * len(data)
        change.data, change.durable, change.loose, change.acknowledged = data, durable, loose, True

    def expect(self, have, offset, what):
        """A server that lives returned this."""
        end = offset + len(have)
        if have != self.now[offset:end]:
            self.now[offset:end] = loosely(have, self.now[offset:end], self.loose_now[offset:end])
            same(have, self.now[offset:end], f"{what} at {offset}")

    def mark(self):
        """Taken before a flush is sent: what it will cover."""
        with self.lock:
            return [self.folded[w] + self.settled(w) for w in range(len(self.logs))]

    def settled(self, writer):
        """How many of its changes are acknowledged: each writer waits for one before it begins the next."""
        log = list(self.logs[writer])
        return len(log) - 1 if log and not log[-1].acknowledged else len(log)

    def flushed(self, mark):
        with self.lock:
            for writer, count in enumerate(mark):
                for change in self.logs[writer][:max(0, count - self.folded[writer])]:
                    self.base[change.offset:change.end] = change.data
                    self.loose_base[change.offset:change.end] = (b"\1" if change.loose else b"\0") * len(change.data)
                    self.logs[writer].pop(0)
                    self.folded[writer] += 1

    # --- after it was killed --------------------------------------------------------------------------------------

    def unflushed(self):
        return sum(len(log) for log in self.logs)

    def settle(self, have, orderly, what):
        """Throws unless the disk may be like this. From now on it is."""
        if orderly:
            self.flushed(self.mark())
        want = bytearray(self.base)
        for log in self.logs:
            edges = sorted({e for c in log for e in (c.offset, c.end)})
            for start, end in zip(edges, edges[1:]):
                candidates = self.candidates(log, start, end)
                if candidates:
                    self.one_of(candidates, have[start:end], start, what)
                    want[start:end] = have[start:end]
        if have != want and any(self.loose_base):
            want = loosely(have, want, self.loose_base)
        same(have, want, what)
        self.__init__(have, len(self.logs))

    def candidates(self, log, start, end):
        """Newest first; none where this writer changed nothing."""
        found = []
        for change in reversed(log):
            if change.offset <= start and end <= change.end:
                if change.data is None or change.loose:
                    found.append(bytes(end - start))
                if change.data is not None:
                    found.append(change.data[start - change.offset:end - change.offset])
                if change.durable:
                    return found
        if found and any(self.loose_base[start:end]):
            found.append(bytes(end - start))
        return found and found + [bytes(self.base[start:end])]

    def one_of(self, candidates, have, start, what):
        """Each byte is that of one of the candidates."""
        if have in candidates:
            return
        if len(have) == 1:
            raise Disagreement(f"{what}: byte {start} is {have.hex()}; it may be {' '.join(c.hex() for c in candidates)}")
        half = len(have) // 2
        self.one_of([c[:half] for c in candidates], have[:half], start, what)
        self.one_of([c[half:] for c in candidates], have[half:], start + half, what)


def loosely(have, want, loose):
    """`want`, with zeroes where `have` has them and may."""
    return bytearray(0 if may and not h else w for h, w, may in zip(have, want, loose))


def same(have, want, what):
    if have != want:
        at = next((i for i, (a, b) in enumerate(zip(have, want)) if a != b), min(len(have), len(want)))
        raise Disagreement(f"{what}: byte {at} is {have[at:at + 1].hex()}, not {bytes(want[at:at + 1]).hex()}; "
                           f"lengths {len(have)} and {len(want)}")
