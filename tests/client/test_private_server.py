# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
"""An image file as TARGET: a private nbdkit that nobody sees, that outlives neither success nor murder."""

import glob
import pty
import signal

from harness import *


def children_of(pid):
    out = []
    for path in glob.glob("/proc/[0-9]*/stat"):
        try:
            with open(path) as f:
                fields = f.read().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            out.append(int(path.split("/")[2]))
    return out


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


class PrivateServer(Case):
    def setUp(self):
        super().setUp()
        self.qlean = self.build_tree()
        self.tmp = self.dir + "/tmp"
        os.mkdir(self.tmp)
        self.env = dict(os.environ, TMPDIR=self.tmp)

    def go(self, *arguments, code=DONE):
        result = subprocess.run([self.qlean, *arguments], capture_output=True, text=True, timeout=60, env=self.env)
        self.assertEqual(result.returncode, code, result.stderr)
        self.assertEqual(os.listdir(self.tmp), [], "left behind")
        return result

    def start(self, *arguments):
        process = subprocess.Popen([self.qlean, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                   env=self.env)
        self.addCleanup(process.communicate)
        log = self.dir + "/log"
        wait_for(lambda: events(read_log(log), "cache"), "the first request")
        return process, children_of(process.pid)[0]

    def stand_in(self, command):
        """A shell script in place of nbdkit; returns its path."""
        path = self.dir + "/stand-in-nbdkit"
        with open(path, "w") as f:
            f.write(f"#!/bin/sh\n{command}\n")
        os.chmod(path, 0o755)
        return path

    def test_path_through_a_symbolic_link(self):
        # link/../disk.qcow2 lies beside what the link points to, as for every other program.
        os.makedirs(self.dir + "/there/below")
        os.symlink("there/below", self.dir + "/link")
        self.image("disk.qcow2", "size=64M", "todo=compact:0+8M")
        image = self.image("there/disk.qcow2", "size=64M", "todo=compact:0+16M")
        self.assertTrue(os.path.samefile(image, self.dir + "/link/../disk.qcow2"))
        plan = json.loads(self.go("plan", "--json", self.dir + "/link/../disk.qcow2", "compact").stdout)
        self.assertEqual(plan["exports"][0]["bytes"], 16 * M)

    def test_every_command(self):
        image = self.image("disk.qcow2", "size=64M", "todo=compact:0+8M")
        self.assertIn(image, self.go("status", image).stdout)
        plan = json.loads(self.go("plan", "--json", image, "compact").stdout)
        self.assertEqual(plan["exports"][0]["bytes"], 8 * M)
        self.go("compact", "--dry-run", image)
        self.assertEqual(events(read_log(self.dir + "/log"), "cache"), [])
        summary = json.loads(self.go("compact", "--json", image).stdout)
        self.assertEqual(summary["operations"][-1]["handled_bytes"], 8 * M)

    def test_looking_is_read_only(self):
        image = self.image("disk.qcow2", "size=64M")
        self.assertTrue(json.loads(self.go("status", "--json", image).stdout)["server"]["read_only"])

    def test_relative_path_and_strange_name(self):
        self.image("a b=c,d'.qcow2", "size=64M")
        result = subprocess.run([self.qlean, "status", "a b=c,d'.qcow2"], cwd=self.dir, env=self.env, capture_output=True,
                                text=True)
        self.assertEqual(result.returncode, DONE, result.stderr)

    def test_not_an_image(self):
        image = self.image("disk.raw", magic=b"\0\0\0\0")
        result = self.go("compact", image, code=ERROR)
        self.assert_one_sentence(result.stderr, "this is not a QCOW2 image", image)

    def test_no_nbdkit(self):
        image = self.image()
        result = self.go("status", "--nbdkit", "/nonexistent/nbdkit", image, code=ERROR)
        self.assert_one_sentence(result.stderr, "cannot be started")

    def test_nbdkit_that_ends_without_a_word(self):
        for command, words in (("exit 3", "with exit status 3"), ("kill -SEGV $$", "by signal 11 (Segmentation fault)")):
            with self.subTest(command=command):
                image = self.image()
                result = self.go("status", "--nbdkit", self.stand_in(command), image, code=ERROR)
                self.assert_one_sentence(result.stderr, f"cannot serve {image}: nbdkit ended without a word, {words}")

    def test_plugin_by_name_when_there_is_no_build_tree(self):
        os.unlink(self.dir + "/tree/plugin/nbdkit-qcow2-plugin.so")
        wrapper = self.dir + "/nbdkit-wrapper"
        with open(wrapper, "w") as f:
            f.write('#!/bin/sh\necho "$@" >' + self.dir + '/arguments\necho "nbdkit: error: no such plugin" >&2\nexit 1\n')
        os.chmod(wrapper, 0o755)
        self.go("status", "--nbdkit", wrapper, self.image(), code=ERROR)
        with open(self.dir + "/arguments") as f:
            self.assertRegex(f.read(), r"-r qcow2 file=/")

    def test_long_tmpdir(self):
        self.tmp = self.dir + "/" + "x" * 120
        os.mkdir(self.tmp)
        self.env["TMPDIR"] = self.tmp
        self.go("status", self.image())

    def test_socket_is_private(self):
        image = self.image("disk.qcow2", "size=64M", "todo=compact:0+64M", "cache-ms=200", "version=1.32.5")
        process, _ = self.start("compact", image)
        directory = os.path.join(self.tmp, os.listdir(self.tmp)[0])
        self.assertEqual(os.stat(directory).st_mode & 0o777, 0o700)
        process.send_signal(signal.SIGTERM)
        process.wait(10)

    def test_signal_to_the_client_drains_and_ends_the_server(self):
        image = self.image("disk.qcow2", "size=1G", "todo=compact:0+1G", "cache-ms=300")
        process, server = self.start("compact", "--no-zeroes", image)
        # Another process group: the terminal's Ctrl-C must reach the client only.
        self.assertNotEqual(os.getpgid(server), os.getpgid(process.pid))
        process.send_signal(signal.SIGINT)
        process.wait(10)
        self.assertEqual(process.returncode, STOPPED)
        self.assertFalse(alive(server))
        self.assertEqual(os.listdir(self.tmp), [])
        order = [e["event"] for e in read_log(self.dir + "/log") if e["event"] in ("cache-end", "flush-end")]
        self.assertEqual(order[-1], "flush-end")

    def test_control_c_on_a_terminal(self):
        image = self.image("disk.qcow2", "size=1G", "todo=compact:0+1G", "cache-ms=300")
        pid, master = pty.fork()
        if pid == 0:
            os.execve(self.qlean, [self.qlean, "compact", "--no-zeroes", image], self.env)
        self.addCleanup(os.close, master)
        log = self.dir + "/log"
        wait_for(lambda: len(events(read_log(log), "cache")) >= 2, "requests in flight")
        server = children_of(pid)[0]
        os.write(master, b"\x03")
        text = b""
        for _ in range(100):
            try:
                while data := os.read(master, 65536):
                    text += data
            except OSError:  # the terminal is closed: the client has ended; what it wrote last may still be on its way
                if b"stopped early" in text:
                    break
                time.sleep(0.05)
        self.assertEqual(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), STOPPED)
        self.assertIn(b"stopped early (SIGINT)", text)
        ended = [e for e in read_log(log) if e["event"] in ("cache-end", "flush-end")]
        self.assertTrue(all(e.get("error", 0) == 0 for e in ended))
        self.assertEqual(ended[-1]["event"], "flush-end")
        self.assertFalse(alive(server))
        self.assertEqual(os.listdir(self.tmp), [])

    def test_client_killed(self):
        image = self.image("disk.qcow2", "size=1G", "todo=compact:0+1G", "cache-ms=100", "version=1.32.5")
        process, server = self.start("compact", "--no-zeroes", image)
        process.kill()
        process.wait()
        wait_for(lambda: not alive(server), "the private server to follow its client")

    def test_client_killed_while_the_server_starts(self):
        # nbdkit 1.32 -f asks for its parent's death signal itself; this one does not, and never listens.
        slow = self.stand_in("exec sleep 60")
        process = subprocess.Popen([self.qlean, "status", "--nbdkit", slow, self.image()], env=self.env)
        server = wait_for(lambda: children_of(process.pid), "the stand-in")[0]
        wait_for(lambda: os.readlink(f"/proc/{server}/exe").endswith("sleep"), "its exec")
        process.kill()
        process.wait()
        wait_for(lambda: not alive(server), "the stand-in to follow its client")

    def test_no_connection_that_is_not_used(self):
        # nbdkit 1.32 may crash if it is to end while a connection is beginning.
        loud = self.stand_in(f'exec nbdkit -v "$@" 2>>{self.dir}/said')
        for _ in range(5):
            self.go("status", "--nbdkit", loud, self.image())
        with open(self.dir + "/said") as f:
            said = f.read()
        accepted = said.count("accepted connection")
        self.assertGreaterEqual(accepted, 5)
        self.assertEqual(said.count("newstyle negotiation: client flags"), accepted)
        self.assertNotIn("sending newstyle handshake", said)

    def test_a_signal_to_what_has_nothing_to_finish_leaves_no_files(self):
        slow = self.stand_in("exec sleep 60")
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            for arguments in (["status"], ["check"], ["snapshot", "list"]):
                with self.subTest(signal=number, arguments=arguments):
                    process = subprocess.Popen([self.qlean, *arguments, "--nbdkit", slow, self.image()], env=self.env,
                                               preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))
                    server = wait_for(lambda: children_of(process.pid), "the stand-in")[0]
                    wait_for(lambda: os.readlink(f"/proc/{server}/exe").endswith("sleep"), "its exec")
                    self.assertNotEqual(os.listdir(self.tmp), [])
                    process.send_signal(number)
                    self.assertEqual(process.wait(5), -number)
                    self.assertEqual(os.listdir(self.tmp), [])
                    wait_for(lambda: not alive(server), "the stand-in to follow its client")

    def test_an_ignored_signal_stays_ignored(self):
        # What nohup and a script's `&` ask for.
        slow = self.stand_in("exec sleep 60")
        for number in (signal.SIGHUP, signal.SIGQUIT):
            with self.subTest(signal=number):
                process = subprocess.Popen([self.qlean, "status", "--nbdkit", slow, self.image()], env=self.env,
                                           preexec_fn=lambda: signal.signal(number, signal.SIG_IGN))
                wait_for(lambda: children_of(process.pid), "the stand-in")
                process.send_signal(number)
                with self.assertRaises(subprocess.TimeoutExpired):
                    process.wait(0.5)
                process.terminate()
                process.wait(5)

    def test_second_signal_leaves_no_files(self):
        image = self.image("disk.qcow2", "size=1G", "todo=compact:0+1G", "cache-ms=3000", "version=1.32.5")
        process, server = self.start("compact", "--no-zeroes", image)
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        self.assertEqual(process.wait(2), -signal.SIGINT)
        self.assertEqual(os.listdir(self.tmp), [])
        wait_for(lambda: not alive(server), "the private server")

    def test_server_dies(self):
        image = self.image("disk.qcow2", "size=1G", "todo=compact:0+1G", "die-after=4")
        result = self.go("compact", "--no-zeroes", image, code=SERVER_GONE)
        # It was ours: there is nothing to wait for.
        self.assert_one_sentence(result.stderr, "connection to the server was lost", "run the command again")
        self.assertNotIn("when it is back", result.stderr)


main()
