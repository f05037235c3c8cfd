# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# The reclaim filter over real servers: what its exports offer and do, and the two races that would lose a guest's
# write, replayed step by step with a plugin that stops on command.
#
# usage: filter_tests.py FILTER HOLD_PLUGIN MODEL_TEST [unittest arguments]

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest

import nbd

FILTER, HOLD_PLUGIN, MODEL_TEST = sys.argv[1:4]

K = 1024
CLUSTER = 64 * K
TO_DO, NOTHING = 0, 1


def wait_for(condition, what, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError("waited in vain for " + what)
        time.sleep(0.002)


class Server:
    """An nbdkit of our own, with the filter on top of a plugin."""

    def __init__(self, *args, options=()):
        self.dir = tempfile.mkdtemp(prefix="reclaim-")
        self.socket = self.dir + "/sock"
        self.log = self.dir + "/log"
        self.err = open(self.dir + "/err", "w")
        pid = self.dir + "/pid" # written when the socket is ready, which the socket's existence doesn't tell
        command = ["nbdkit", "-f", "-v", "-U", self.socket, "-P", pid, *options, "--filter=" + FILTER, "--filter=log",
                   *args, "logfile=" + self.log]
        self.process = subprocess.Popen(command, stderr=self.err)
        self.handles = []
        wait_for(lambda: os.path.exists(pid) or self.process.poll() is not None, "the server", 60)
        if self.process.poll() is not None:
            raise AssertionError("nbdkit did not start: " + self.messages())

    def connect(self, name=""):
        h = nbd.NBD()
        h.set_export_name(name)
        h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
        h.connect_unix(self.socket)
        self.handles.append(h)
        return h

    def messages(self):
        self.err.flush()
        with open(self.dir + "/err") as f:
            return f.read()

    def inner_calls(self, *kinds):
        """The calls of these kinds that reached the plugin, as (kind, offset, count)."""
        calls = []
        with open(self.log) as f:
            for line in f:
                word = line.split()
                kind = next((w for w in word if w in kinds), None)
                if kind and not any(w.startswith("...") and len(w) > 3 for w in word):
                    field = dict(w.split("=", 1) for w in word if "=" in w)
                    calls.append((kind, int(field["offset"], 0), int(field["count"], 0)))
        return calls

    def stop(self):
        for h in self.handles:
            try:
                h.shutdown()
            except nbd.Error:
                pass
        self.handles = []
        if self.process.poll() is None:
            self.process.terminate()
        code = self.process.wait(10)
        self.err.close()
        shutil.rmtree(self.dir)
        return code


def plan(h, count=None, offset=0):
    """The extents of a block status, as (length, flags)."""
    extents = []
    count = h.get_size() - offset if count is None else count
    h.block_status(count, offset, lambda context, at, e, err: extents.extend(zip(e[::2], e[1::2])))
    return extents


def status(server):
    h = server.connect("status")
    page = h.pread(65536, 0)
    h.shutdown()
    return json.loads(page)["reclaim"]


class Async:
    """A request in flight on a connection of its own."""

    def __init__(self, handle, cookie, buffer=None):
        self.handle, self.cookie, self.buffer = handle, cookie, buffer
        self.finished = False

    def finishes_within(self, seconds):
        end = time.monotonic() + seconds
        while not self.finished:
            if self.handle.aio_command_completed(self.cookie):
                self.finished = True # libnbd tells it once
                break
            left = end - time.monotonic()
            if left <= 0:
                return False
            self.handle.poll(max(1, int(left * 1000)))
        return True


def aio_write(h, data, offset):
    buffer = nbd.Buffer.from_bytearray(bytearray(data))
    return Async(h, h.aio_pwrite(buffer, offset), buffer)


class FilterTest(unittest.TestCase):
    def server(self, *args, **kw):
        # What the memory plugin prefers differs between versions of nbdkit.
        if "memory" in args and not any(a.startswith(("reclaim-cluster=", "blocksize-preferred=")) for a in args):
            args += ("reclaim-cluster=64K",)
        s = Server(*args, **kw)
        self.addCleanup(s.stop)
        return s

    def refused(self, call, *args):
        with self.assertRaises(nbd.Error) as caught:
            call(*args)
        self.assertEqual(caught.exception.errnum, errno.EPERM)


class Exports(FilterTest):
    def test_reclaim_is_listed_beside_the_plugins_own(self):
        s = self.server(HOLD_PLUGIN)
        h = nbd.NBD()
        h.set_opt_mode(True)
        h.connect_unix(s.socket)
        names = []
        h.opt_list(lambda name, description: names.append(name))
        h.opt_abort()
        self.assertEqual(names, ["", "status", "reclaim"])

    def test_what_reclaim_offers(self):
        h = self.server(HOLD_PLUGIN, "size=1000001").connect("reclaim")
        self.assertEqual(h.get_size(), 1000001)
        self.assertTrue(h.is_read_only())
        self.assertTrue(h.can_flush())
        self.assertTrue(h.can_cache())
        self.assertFalse(h.can_trim())
        self.assertFalse(h.can_zero())
        self.assertEqual(h.get_block_size(nbd.SIZE_MINIMUM), 1)
        self.assertEqual(plan(h), [(1000001, NOTHING)])
        h.flush()

    def test_the_disk_keeps_what_the_plugin_offers(self):
        h = self.server(HOLD_PLUGIN).connect()
        for offered in (h.can_flush, h.can_fua, h.can_trim, h.can_zero, h.can_fast_zero, h.can_multi_conn):
            self.assertTrue(offered())
        self.assertFalse(h.is_read_only())

    def test_reading_is_refused_and_then_nothing_is_given_back(self):
        s = self.server(HOLD_PLUGIN)
        s.connect().pwrite(bytes(CLUSTER), 0)
        h = s.connect("reclaim")
        self.refused(h.pread, 512, 0)
        self.refused(h.cache, CLUSTER, 0)
        self.assertEqual(s.inner_calls("Zero", "Trim"), [])
        other = s.connect("reclaim")
        other.cache(CLUSTER, 0)
        self.assertEqual(s.inner_calls("Zero", "Trim"), [("Zero", 0, CLUSTER)])

    def test_a_read_only_server_gives_nothing_back(self):
        h = self.server(HOLD_PLUGIN, options=["-r"]).connect("reclaim")
        self.assertFalse(h.can_cache())
        self.assertTrue(h.can_flush())
        self.assertEqual(plan(h), [(1 << 20, NOTHING)])

    def test_status_has_the_filters_part(self):
        s = self.server(HOLD_PLUGIN)
        disk = s.connect()
        disk.trim(12 * K, 0)
        disk.pwrite(bytes(CLUSTER), CLUSTER)
        self.assertEqual(status(s), {"granularity": 4096, "recorded_bytes": 76 * K, "ready_bytes": 64 * K,
                                     "given_back_bytes": 0})
        disk.trim(52 * K, 12 * K)
        self.assertEqual(status(s)["given_back_bytes"], 64 * K)

    def test_a_status_page_is_one_snapshot(self):
        s = self.server(HOLD_PLUGIN)
        disk, h = s.connect(), s.connect("status")
        whole = h.pread(65536, 0)
        disk.trim(12 * K, 0)
        self.assertEqual(h.pread(65000, 100), whole[100:65100])
        self.assertEqual(len(h.pread(65536, 0)), 65536)
        self.assertIn(b'"recorded_bytes":12288', h.pread(65536, 0))

    def test_any_plugin_will_do(self):
        for plugin in (["memory", "1M"], ["sparse-random", "1M"], ["pattern", "1M"]):
            with self.subTest(plugin=plugin[0]):
                s = self.server(*plugin)
                self.assertEqual(s.connect().get_size(), 1 << 20)
                self.assertEqual(plan(s.connect("reclaim")), [(1 << 20, NOTHING)])
                self.assertEqual(s.connect("status").get_size(), 1 << 20) # theirs, whatever it is

    def test_a_64_kib_disk_is_not_taken_for_a_status_page(self):
        s = self.server("memory", "64K")
        s.connect("status").pwrite(b'{"a":1}', 0)
        self.assertEqual(s.connect("status").pread(8, 0), b'{"a":1}\0')

    def test_options_are_checked(self):
        for option in ("reclaim-cluster=1000", "reclaim-cluster=64M", "reclaim-memory=1K", "reclaim-memory=much"):
            with self.subTest(option=option):
                r = subprocess.run(["nbdkit", "-U", "-", "--filter=" + FILTER, "memory", "1M", option, "--run", "true"],
                                   capture_output=True, text=True)
                self.assertNotEqual(r.returncode, 0)
                self.assertIn(option.split("=")[0], r.stderr)


class ClusterSize(FilterTest):
    def learned(self, *args, **kw):
        s = self.server(*args, **kw)
        return s.connect("reclaim").get_block_size(nbd.SIZE_PREFERRED)

    def test_it_is_configured(self):
        self.assertEqual(self.learned(HOLD_PLUGIN, "reclaim-cluster=2M"), 2 << 20)

    def test_it_is_read_in_the_status(self):
        self.assertEqual(self.learned(HOLD_PLUGIN, "cluster=131072"), 131072)

    def test_or_is_what_the_plugin_prefers(self):
        self.assertEqual(self.learned("--filter=blocksize-policy", "memory", "1M", "blocksize-preferred=256K",
                                      "blocksize-minimum=1", "blocksize-maximum=32M"), 256 * K)

    def test_or_the_usual_one(self):
        self.assertEqual(self.learned("--filter=blocksize-policy", "memory", "1M", "blocksize-preferred=4K",
                                      "blocksize-minimum=1", "blocksize-maximum=32M"), 64 * K)


class Reclaiming(FilterTest):
    def test_pieces_that_add_up_are_freed_with_the_last_one(self):
        s = self.server("memory", "1M")
        disk = s.connect()
        disk.pwrite(b"x" * (1 << 20), 0)
        pieces = list(range(0, CLUSTER, 4 * K))
        for at in pieces[1::2] + pieces[::2]:
            disk.trim(4 * K, at)
        calls = s.inner_calls("Trim", "Zero")
        self.assertEqual(len(calls), 17)
        self.assertEqual(calls[-1], ("Trim", 0, CLUSTER))
        self.assertEqual(disk.pread(CLUSTER + 1, 0), bytes(CLUSTER) + b"x")

    def test_zero_payloads_are_given_back_through_the_export(self):
        s = self.server("memory", "1M")
        disk, reclaim = s.connect(), s.connect("reclaim")
        disk.pwrite(b"x" * (1 << 20), 0)
        disk.pwrite(bytes(CLUSTER), 2 * CLUSTER)
        disk.zero(CLUSTER, 3 * CLUSTER, nbd.CMD_FLAG_NO_HOLE)
        disk.pwrite(bytes(CLUSTER), 5 * CLUSTER)
        disk.pwrite(b"y", 5 * CLUSTER + 77)
        self.assertEqual(plan(reclaim), [(2 * CLUSTER, NOTHING), (2 * CLUSTER, TO_DO), (12 * CLUSTER, NOTHING)])
        reclaim.cache(1 << 20, 0)
        reclaim.flush()
        self.assertEqual(plan(reclaim), [(16 * CLUSTER, NOTHING)])
        self.assertEqual(s.inner_calls("Trim", "Zero")[1:], [("Zero", 2 * CLUSTER, 2 * CLUSTER)])
        after = b"x" * 2 * CLUSTER + bytes(2 * CLUSTER) + b"x" * CLUSTER
        self.assertEqual(disk.pread(5 * CLUSTER + 78, 0), after + bytes(77) + b"y")

    def test_a_file_gets_its_space_back(self):
        with tempfile.TemporaryDirectory() as d:
            path = d + "/disk"
            with open(path, "wb") as f:
                f.write(os.urandom(8 << 20))
            s = self.server("file", path)
            disk, reclaim = s.connect(), s.connect("reclaim")
            disk.pwrite(bytes(4 << 20), 1 << 20)
            disk.flush()
            before = os.stat(path).st_blocks
            reclaim.cache(8 << 20, 0)
            reclaim.flush()
            self.assertEqual(before - os.stat(path).st_blocks, (4 << 20) // 512)
            self.assertEqual(disk.pread(4 << 20, 1 << 20), bytes(4 << 20))

    def test_a_write_through_another_name_of_the_same_disk_is_not_lost(self):
        s = self.server("memory", "1M") # one disk under any name
        s.connect().pwrite(bytes(CLUSTER), 0)
        s.connect("alias").pwrite(b"precious", 4096)
        s.connect("reclaim").cache(1 << 20, 0)
        self.assertEqual(s.connect().pread(8, 4096), b"precious")

    def test_a_zero_request_emulated_by_nbdkit_is_not_recorded(self):
        s = self.server("--filter=nozero", "memory", "1M", "zeromode=emulate")
        disk, reclaim = s.connect(), s.connect("reclaim")
        disk.zero(CLUSTER, 0)
        disk.pwrite(bytes(CLUSTER), CLUSTER)
        self.assertEqual(plan(reclaim), [(1 << 20, NOTHING)])
        for at in range(0, CLUSTER, 8 * K):
            disk.trim(8 * K, at)
        self.assertEqual(s.inner_calls("Trim")[-1], ("Trim", 0, CLUSTER))

    def test_a_long_trim(self):
        s = self.server("memory", "8G")
        disk = s.connect()
        disk.trim((1 << 32) - 65536, 1000)
        calls = s.inner_calls("Trim")
        self.assertEqual(sum(c[2] for c in calls), (1 << 32) - 65536)
        self.assertEqual(calls[0][1], 1000)
        self.assertLessEqual(len(calls), 129)

    def test_memory_stays_bounded(self):
        s = self.server("memory", "1G", "reclaim-memory=64K")
        disk = s.connect()
        for at in range(0, 1 << 30, CLUSTER):
            disk.trim(4 * K, at)
        self.assertEqual(plan(s.connect("reclaim")), [(1 << 30, NOTHING)])
        for at in range(4 * K, CLUSTER, 4 * K): # the newest is still known
            disk.trim(4 * K, (1 << 30) - CLUSTER + at)
        self.assertEqual(s.inner_calls("Trim")[-1], ("Trim", (1 << 30) - CLUSTER, CLUSTER))

    def test_a_failing_disk(self):
        gate = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, gate)
        s = self.server(HOLD_PLUGIN, "gate=" + gate)
        disk, reclaim = s.connect(), s.connect("reclaim")
        disk.pwrite(bytes(CLUSTER), 0)
        open(gate + "/fail-zero", "w").close()
        with self.assertRaises(nbd.Error) as caught:
            reclaim.cache(CLUSTER, 0)
        self.assertEqual(caught.exception.errnum, errno.EIO)
        os.unlink(gate + "/fail-zero")
        self.assertEqual(plan(reclaim), [(1 << 20, NOTHING)])

    def test_the_client_of_a_long_reclaim_goes_away(self):
        s = self.server(HOLD_PLUGIN, "size=64M", "delay=20000", "reclaim-cluster=64K")
        disk = s.connect()
        for at in range(0, 64 << 20, 32 << 20):
            disk.pwrite(bytes(32 << 20), at)
        h = s.connect("reclaim")
        h.aio_cache(64 << 20, 0)
        wait_for(lambda: s.inner_calls("Zero"), "the first step")
        h.aio_disconnect(0)
        del h
        s.handles.pop()
        time.sleep(1)
        done = len(s.inner_calls("Zero"))
        self.assertLess(done, 32)
        time.sleep(0.3)
        self.assertEqual(len(s.inner_calls("Zero")), done)
        self.assertEqual(disk.pread(10, 0), bytes(10))


class Races(FilterTest):
    """Each loses a write when the rule it is named for is taken out."""

    def setUp(self):
        self.gate = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.gate)
        self.s = self.server(HOLD_PLUGIN, "gate=" + self.gate)
        self.addCleanup(self.open_gates)

    def hold(self, op, when):
        open("%s/hold-%s-%s" % (self.gate, op, when), "w").close()

    def wait_held(self, op):
        wait_for(lambda: os.path.exists("%s/held-%s" % (self.gate, op)), op + " to be held")

    def release(self, op):
        os.unlink("%s/held-%s" % (self.gate, op))

    def open_gates(self):
        for name in os.listdir(self.gate):
            os.unlink(self.gate + "/" + name)

    def reclaim_everything(self):
        self.s.connect("reclaim").cache(1 << 20, 0)

    def test_giving_back_holds_the_cluster_to_the_end_of_the_inner_call(self):
        disk = self.s.connect()
        disk.pwrite(bytes(CLUSTER), 0)
        reclaim = self.s.connect("reclaim")
        self.hold("zero", "before") # the reclaim has seen the cluster complete, and hasn't freed it yet
        giving_back = Async(reclaim, reclaim.aio_cache(CLUSTER, 0))
        self.wait_held("zero")
        write = aio_write(disk, b"W" * 4096, 8192)
        acknowledged = write.finishes_within(0.5)
        self.release("zero")
        self.assertTrue(giving_back.finishes_within(10))
        self.assertTrue(write.finishes_within(10))
        self.assertEqual(disk.pread(4096, 8192), b"W" * 4096)
        self.assertFalse(acknowledged)

    def test_giving_back_looks_again_when_it_has_the_cluster(self):
        disk = self.s.connect()
        disk.pwrite(bytes(CLUSTER), 0)
        reclaim = self.s.connect("reclaim")
        self.hold("pwrite", "before")
        again = aio_write(disk, bytes(4096), 0) # holds the cluster, which is still recorded from end to end
        self.wait_held("pwrite")
        giving_back = Async(reclaim, reclaim.aio_cache(CLUSTER, 0))
        self.assertFalse(giving_back.finishes_within(0.5)) # it has seen that, and waits
        open(self.gate + "/fail-pwrite", "w").close() # what the write leaves behind, nobody knows
        self.release("pwrite")
        with self.assertRaises(nbd.Error):
            again.finishes_within(10)
        self.assertTrue(giving_back.finishes_within(10))
        self.assertEqual(self.s.inner_calls("Zero", "Trim"), [])

    def test_the_discard_that_completes_a_cluster_holds_it_too(self):
        disk, other = self.s.connect(), self.s.connect()
        disk.trim(32 * K, 0)
        self.hold("trim", "after")
        last = Async(other, other.aio_trim(32 * K, 32 * K))
        self.wait_held("trim")
        self.hold("trim", "before")
        self.release("trim")
        self.wait_held("trim") # the last piece is discarded and recorded, the whole cluster not yet freed
        write = aio_write(disk, b"W" * 4096, 0)
        acknowledged = write.finishes_within(0.5)
        self.release("trim")
        self.assertTrue(last.finishes_within(10))
        self.assertTrue(write.finishes_within(10))
        self.assertEqual(disk.pread(4096, 0), b"W" * 4096)
        self.assertFalse(acknowledged)

    def test_a_zero_payload_holds_its_clusters_until_it_is_recorded(self):
        disk, other = self.s.connect(), self.s.connect()
        self.hold("pwrite", "after") # zeroes have reached the disk, and aren't recorded yet
        zeroes = aio_write(other, bytes(CLUSTER), 0)
        self.wait_held("pwrite")
        write = aio_write(disk, b"W" * 4096, 8192)
        acknowledged = write.finishes_within(0.5)
        self.release("pwrite")
        self.assertTrue(zeroes.finishes_within(10))
        self.assertTrue(write.finishes_within(10))
        self.reclaim_everything()
        self.assertEqual(disk.pread(4096, 8192), b"W" * 4096)
        self.assertFalse(acknowledged)

    def test_a_zero_request_holds_its_clusters_until_it_is_recorded(self):
        disk, other = self.s.connect(), self.s.connect()
        self.hold("zero", "after")
        zeroes = Async(other, other.aio_zero(CLUSTER, 0, flags=nbd.CMD_FLAG_NO_HOLE))
        self.wait_held("zero")
        write = aio_write(disk, b"W" * 4096, 8192)
        acknowledged = write.finishes_within(0.5)
        self.release("zero")
        self.assertTrue(zeroes.finishes_within(10))
        self.assertTrue(write.finishes_within(10))
        self.reclaim_everything()
        self.assertEqual(disk.pread(4096, 8192), b"W" * 4096)
        self.assertFalse(acknowledged)

    def test_a_write_holds_its_clusters_until_the_inner_write_has_returned(self):
        disk, other = self.s.connect(), self.s.connect()
        self.hold("pwrite", "before") # the write has cleared the record and hasn't reached the disk
        write = aio_write(other, b"W" * 4096, 8192)
        self.wait_held("pwrite")
        zeroes = Async(disk, disk.aio_zero(CLUSTER, 0, flags=nbd.CMD_FLAG_NO_HOLE))
        overtook = zeroes.finishes_within(0.5)
        self.release("pwrite")
        self.assertTrue(write.finishes_within(10))
        self.assertTrue(zeroes.finishes_within(10))
        before = disk.pread(4096, 8192)
        self.reclaim_everything()
        # Which of the two came last is nobody's business, but what has been read stays.
        self.assertEqual(disk.pread(4096, 8192), before)
        self.assertFalse(overtook)


class Model(FilterTest):
    def run_model(self, *args, seconds="4"):
        s = Server(*args)
        try:
            r = subprocess.run([MODEL_TEST, s.socket, seconds], capture_output=True, text=True, timeout=120)
            self.assertEqual(r.returncode, 0, r.stdout + r.stderr)
        finally:
            code = s.stop()
        self.assertEqual(code, 0)

    def test_guests_and_reclaim_agree_with_a_plain_array(self):
        self.run_model(HOLD_PLUGIN, "size=2100001", "delay=300")

    def test_the_same_with_other_clusters(self):
        self.run_model(HOLD_PLUGIN, "size=2100001", "cluster=16384")

    def test_the_same_while_the_record_forgets(self):
        self.run_model("memory", "100M", "reclaim-memory=64K", "reclaim-cluster=8K", seconds="2")


if __name__ == "__main__":
    signal.alarm(280)
    unittest.main(argv=[sys.argv[0], *sys.argv[4:]], verbosity=2)
