# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
"""serve: the socket's life, the arguments nbdkit gets, the libvirt snippet."""

import xml.etree.ElementTree

from harness import *


class Serve(Case):
    def setUp(self):
        super().setUp()
        self.qlean = self.build_tree()

    def start(self, *arguments, binary=None):
        process = subprocess.Popen([binary or self.qlean, "serve", *arguments], stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True)

        def end():
            process.terminate()
            process.communicate()
        self.addCleanup(end)
        return process

    def command_line(self, process):
        wait_for(lambda: os.readlink(f"/proc/{process.pid}/exe").endswith("nbdkit"), "the exec of nbdkit")
        with open(f"/proc/{process.pid}/cmdline") as f:
            return f.read().split("\0")[:-1]

    def fail(self, *arguments, code=ERROR):
        result = subprocess.run([self.qlean, "serve", *arguments], capture_output=True, text=True, timeout=20)
        self.assertEqual(result.returncode, code, result.stderr)
        return result

    def test_default_socket_and_snippet(self):
        image = self.image("disk & more.qcow2", "size=64M", "todo=compact:0+1M")
        process = self.start(image)
        wait_for(lambda: listening(image + ".sock"), "the socket")
        text = ""
        while "</disk>" not in text:
            text += process.stdout.readline()
        disk = xml.etree.ElementTree.fromstring(text[text.index("<disk"):])
        self.assertEqual(disk.get("type"), "network")
        self.assertEqual(disk.find("source").get("protocol"), "nbd")
        self.assertEqual(disk.find("source/host").get("socket"), image + ".sock")
        self.assertEqual(disk.find("driver").get("discard"), "unmap")
        self.assertEqual(disk.find("driver").get("error_policy"), "stop")
        self.assertEqual(os.stat(image + ".sock").st_mode & 0o022, 0)
        # The process that was started is the server now, and the client can use it.
        self.assertEqual(os.path.basename(self.command_line(process)[0]), "nbdkit")
        self.run_qlean("compact", image + ".sock")

    def test_options_reach_nbdkit(self):
        image = self.image("disk.qcow2", "size=64M")
        path = self.dir + "/other.sock"
        process = self.start(image, "--socket", path, "--threads", "7", "-r", "--", "--no-sr", "pending=4")
        wait_for(lambda: listening(path), "the socket")
        words = self.command_line(process)
        self.assertEqual(words[words.index("-t") + 1], "7")
        for word in ("-f", "-r", "--no-sr", "pending=4", "file=" + image):
            self.assertIn(word, words)
        page = self.run_json("status", path)
        self.assertTrue(page["server"]["read_only"])
        self.assertEqual(page["compact"]["pending"], 4)

    def test_stale_socket_is_removed(self):
        image = self.image("disk.qcow2", "size=64M")
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(image + ".sock")
        self.start(image)
        wait_for(lambda: listening(image + ".sock"), "the new socket")

    def test_live_socket_is_refused(self):
        image = self.image("disk.qcow2", "size=64M")
        self.start(image)
        wait_for(lambda: listening(image + ".sock"), "the socket")
        self.assert_one_sentence(self.fail(image, code=BUSY).stderr, "already listening")
        self.run_qlean("status", image + ".sock")

    def test_other_files_are_not_removed(self):
        image = self.image("disk.qcow2", "size=64M")
        with open(image + ".sock", "w") as f:
            f.write("precious")
        self.assert_one_sentence(self.fail(image).stderr, "not a socket")
        self.assertEqual(open(image + ".sock").read(), "precious")

    def test_socket_path_too_long(self):
        image = self.image("x" * 120)
        self.assert_one_sentence(self.fail(image).stderr, "longer", "--socket")

    def test_missing_image(self):
        self.assert_one_sentence(self.fail(self.dir + "/missing").stderr, "missing", "No such file")

    def test_no_nbdkit(self):
        result = self.fail("--nbdkit=/nonexistent", self.image())
        self.assertIn("--nbdkit", result.stderr)

    def test_filter_that_does_not_load(self):
        image = self.image("disk.qcow2", "size=64M")
        # A plugin is no filter: nbdkit refuses it, and the image is served without.
        os.mkdir(self.dir + "/tree/filter")
        shutil.copy(FAKE_PLUGIN, self.dir + "/tree/filter/nbdkit-reclaim-filter.so")
        process = self.start(image)
        wait_for(lambda: listening(image + ".sock"), "the socket")
        self.assertFalse([w for w in self.command_line(process) if w.startswith("--filter")])
        self.assertIn("without the reclaim filter", process.stderr.readline())

    def test_filter_that_loads(self):
        found = subprocess.run(["nbdkit", "--dump-config"], capture_output=True, text=True).stdout
        directory = dict(line.split("=", 1) for line in found.splitlines() if "=" in line)["filterdir"]
        stand_in = directory + "/nbdkit-noparallel-filter.so"
        if not os.path.exists(stand_in):
            self.skipTest("no stock filter to stand in for ours")
        os.mkdir(self.dir + "/tree/filter")
        shutil.copy(stand_in, self.dir + "/tree/filter/nbdkit-reclaim-filter.so")
        image = self.image("disk.qcow2", "size=64M")
        process = self.start(image)
        wait_for(lambda: listening(image + ".sock"), "the socket")
        wanted = "--filter=" + self.dir + "/tree/filter/nbdkit-reclaim-filter.so"
        self.assertIn(wanted, self.command_line(process))
        other = self.start(image, "--socket", self.dir + "/two", "--no-filter")
        wait_for(lambda: listening(self.dir + "/two"), "the socket")
        self.assertNotIn(wanted, self.command_line(other))


main()
