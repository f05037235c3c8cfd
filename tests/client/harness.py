# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
"""Starts the fake server and the real client; every process and directory ends with the test that made it."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest

QLEAN = os.environ["QLEAN"]
FAKE_PLUGIN = os.environ["FAKE_PLUGIN"]
M = 1048576

DONE, ERROR, USAGE, STOPPED, BUSY, SERVER_GONE = range(6)


def wait_for(condition, what, seconds=10):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError(f"timed out waiting for {what}")


def listening(path):
    with socket.socket(socket.AF_UNIX) as s:
        try:
            s.connect(path)
            return True
        except OSError:
            return False


class Server:
    def __init__(self, directory, *settings, arguments=()):
        self.socket = os.path.join(directory, "sock")
        self.log_path = os.path.join(directory, "log")
        self.process = subprocess.Popen(
            ["nbdkit", "-f", "-U", self.socket, *arguments, FAKE_PLUGIN, "log=" + self.log_path, *settings],
            stderr=subprocess.PIPE)
        wait_for(lambda: self.process.poll() is not None or listening(self.socket), "the fake server")
        assert self.process.poll() is None, self.process.stderr.read()

    def log(self):
        return read_log(self.log_path)

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(10)
        self.process.stderr.close()


def read_log(path):
    if not os.path.exists(path):
        return []
    with open(path) as f:
        return [json.loads(line) for line in f if line.endswith("\n")]


def events(log, event, export=None):
    return [e for e in log if e["event"] == event and export in (None, e["export"])]


class Machine:
    """How late short sleeps end while it is entered, on each processor: all together, and at worst."""

    def __enter__(self):
        self.seconds, self.worst, self.over = 0.0, 0.0, threading.Event()
        self.threads = [threading.Thread(target=self.watch) for _ in range(os.cpu_count())]
        for thread in self.threads:
            thread.start()
        self.begin = time.monotonic()
        return self

    def __exit__(self, *_):
        self.total = time.monotonic() - self.begin
        self.over.set()
        for thread in self.threads:
            thread.join()

    def watch(self):
        while not self.over.is_set():
            begin = time.monotonic()
            time.sleep(0.005)
            late = time.monotonic() - begin - 0.005
            if late > 0.001:
                self.seconds += late
                self.worst = max(self.worst, late)


class Case(unittest.TestCase):
    def setUp(self):
        self.dir = tempfile.mkdtemp(prefix="qlean-test-")
        self.addCleanup(shutil.rmtree, self.dir, ignore_errors=True)

    def server(self, *settings, arguments=()):
        server = Server(self.dir, *settings, arguments=arguments)
        self.addCleanup(server.stop)
        return server

    def run_qlean(self, *arguments, code=DONE, **kwargs):
        result = subprocess.run([QLEAN, *arguments], capture_output=True, text=True, timeout=60, **kwargs)
        self.assertEqual(result.returncode, code, f"{arguments}\nstdout: {result.stdout}\nstderr: {result.stderr}")
        return result

    def run_json(self, *arguments, code=DONE):
        return json.loads(self.run_qlean(*arguments, "--json", code=code).stdout)

    def start_qlean(self, *arguments, **kwargs):
        process = subprocess.Popen([QLEAN, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                   **kwargs)

        def end():
            if process.poll() is None:
                process.kill()
            process.wait()
            process.stdout.close()
            process.stderr.close()
        self.addCleanup(end)
        return process

    def assert_one_sentence(self, stderr, *words):
        lines = [line for line in stderr.splitlines() if line.startswith("qlean: ")]
        self.assertEqual(len(lines), 1, stderr)
        for word in words:
            self.assertIn(word, lines[0])

    def build_tree(self, with_filter=False):
        """A copy of the client beside the fake plugin, as in a build tree; returns the client's path."""
        tree = os.path.join(self.dir, "tree")
        os.makedirs(os.path.join(tree, "client"))
        os.makedirs(os.path.join(tree, "plugin"))
        shutil.copy(QLEAN, os.path.join(tree, "client", "qlean"))
        shutil.copy(FAKE_PLUGIN, os.path.join(tree, "plugin", "nbdkit-qcow2-plugin.so"))
        if with_filter:
            os.makedirs(os.path.join(tree, "filter"))
            shutil.copy(with_filter, os.path.join(tree, "filter", "nbdkit-reclaim-filter.so"))
        return os.path.join(tree, "client", "qlean")

    def image(self, name="disk.qcow2", *settings, magic=b"QFI\xfb"):
        path = os.path.join(self.dir, name)
        with open(path, "wb") as f:
            f.write(magic + bytes(65532))
        with open(path + ".fake", "w") as f:
            f.write("".join(s + "\n" for s in (*settings, "log=" + os.path.join(self.dir, "log"))))
        return path


def main():
    if shutil.which("nbdkit") is None:
        print("nbdkit is not installed")
        sys.exit(77)
    unittest.main(verbosity=2)
