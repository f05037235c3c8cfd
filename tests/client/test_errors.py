# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
"""compact when the server says no: one sentence, the documented exit code, gains committed."""

from harness import *


class Errors(Case):
    def test_busy(self):
        server = self.server("size=64M", "todo=compact:0+8M", "busy=compact")
        result = self.run_qlean("compact", server.socket, code=BUSY)
        self.assert_one_sentence(result.stderr, "busy", "'compact'", "connection 77")
        self.assertEqual(events(server.log(), "flush"), [], "somebody else's work is not ours to commit")

    def test_refused_with_a_reason(self):
        server = self.server("size=64M", "todo=compact:0+8M", "refuse=cluster 17 is referenced but has no refcount")
        result = self.run_qlean("compact", server.socket, code=ERROR)
        self.assert_one_sentence(result.stderr, "refused", "cluster 17 is referenced but has no refcount")

    def test_what_a_server_says_is_not_obeyed_by_the_terminal(self):
        server = self.server("size=64M", "todo=compact:0+8M", "refuse=snapshot '\x1b]0;x\x07\x1b[31m\r'")
        result = self.run_qlean("compact", server.socket, code=ERROR)
        self.assert_one_sentence(result.stderr, "refused", "snapshot '?]0;x??[31m?'")
        self.assertEqual([c for c in result.stderr if c < " " and c != "\n"], [])

    def test_read_only_server(self):
        server = self.server("size=64M", "todo=compact:0+8M", arguments=["-r"])
        self.assert_one_sentence(self.run_qlean("compact", server.socket, code=ERROR).stderr, "read-only")
        self.run_qlean("compact", "--dry-run", server.socket)

    def test_io_error_commits_what_was_done(self):
        for name in ("EIO", "ENOSPC"):
            with self.subTest(errno=name):
                self.setUp()
                server = self.server("size=256M", "todo=compact:0+128M", "error-after=10:" + name)
                summary = self.run_json("compact", "--no-zeroes", server.socket, code=ERROR)
                self.assertIn("writing at 4096 failed", summary["error"])
                self.assertEqual(summary["operations"][0]["handled_bytes"], 9 * 2 * M)
                self.assertEqual(summary["exit_code"], ERROR)
                last = [e for e in server.log() if e["event"] in ("cache-end", "flush-end")][-1]
                self.assertEqual(last["event"], "flush-end")
                server.stop()

    def test_failed_commit(self):
        server = self.server("size=64M", "todo=compact:0+8M", "flush-error=1")
        result = self.run_qlean("compact", "--no-zeroes", server.socket, code=ERROR)
        self.assert_one_sentence(result.stderr, "failed to commit", "fdatasync failed")
        self.assertNotIn("is kept", result.stderr)

    def test_server_shutting_down(self):
        server = self.server("size=256M", "todo=compact:0+128M", "error-after=5:ESHUTDOWN")
        result = self.run_qlean("compact", "--no-zeroes", server.socket, code=SERVER_GONE)
        self.assert_one_sentence(result.stderr, "shutting down")

    def test_page_nested_too_deeply_to_print(self):
        page = os.path.join(self.dir, "page")
        with open(page, "w") as f:
            f.write('{"a":' * 200000 + "1" + "}" * 200000)
        for command in ("status --json", "check --json", "snapshot list --json"):
            result = subprocess.run(["nbdkit", "-U", "-", "file", page, "--run", f'{QLEAN} {command} "$uri"'],
                                    capture_output=True, text=True, timeout=60)
            self.assertEqual(result.returncode, ERROR, command)
            self.assert_one_sentence(result.stderr, "nested too deeply")

    def test_server_vanishes(self):
        server = self.server("size=256M", "todo=compact:0+128M", "die-after=5")
        summary = self.run_json("compact", "--no-zeroes", server.socket, code=SERVER_GONE)
        self.assertIn("connection to the server was lost", summary["error"])
        self.assertIsNone(summary["after"])
        self.assertEqual(summary["exit_code"], SERVER_GONE)

    def test_server_vanishes_in_a_resize(self):
        server = self.server("size=64M", "exports=compact,resize/134217728", "die-after=1")
        result = self.run_qlean("resize", server.socket, "128M", code=SERVER_GONE)
        self.assert_one_sentence(result.stderr, "connection", "lost")

    def test_a_guest_that_cannot_be_asked_about(self):
        # Depth 1 and 100 ms each: the guest is looked at, in vain, while there is something to commit.
        server = self.server("size=64M", "todo=compact:0+64M", "cache-ms=100", "version=1.32.5", "guest-p99=100",
                             "status-error=1")
        self.run_qlean("compact", "--no-zeroes", server.socket)
        self.assertNotEqual(events(server.log(), "status-error"), [])
        self.assertEqual(events(server.log(), "cache-end")[-1]["error"], 0)
        self.assertEqual(events(server.log(), "flush-end")[-1]["export"], "compact")

    def test_pages_that_are_none(self):
        # A foreign server may have anything of that name, of any size; and say anything.
        for command, name in ((["status"], "status"), (["check"], "check"), (["snapshot", "list"], "snapshots")):
            for arguments in (["memory", "1T"], ["data", "91 49 93"], ["null", "0"]):
                with self.subTest(command=command, plugin=arguments):
                    socket_path = os.path.join(self.dir, "foreign")
                    process = subprocess.Popen(["nbdkit", "-f", "-U", socket_path, *arguments])
                    wait_for(lambda: process.poll() is not None or listening(socket_path), "the foreign server")
                    try:
                        result = self.run_qlean(*command, "--json", socket_path, code=ERROR)
                        self.assert_one_sentence(result.stderr, f"'{name}'", "is this server nbdkit")
                    finally:
                        process.terminate()
                        process.wait(10)
                        os.unlink(socket_path)

    def test_server_without_compact(self):
        server = self.server("size=64M", "exports=zeroes")
        self.assert_one_sentence(self.run_qlean("compact", server.socket, code=ERROR).stderr, "'compact'")

    def test_stdout_full(self):
        server = self.server("size=64M")
        with open("/dev/full", "w") as full:
            for command in ("status", "plan", "compact"):
                result = subprocess.run([QLEAN, command, server.socket], stdout=full, stderr=subprocess.PIPE, text=True)
                self.assertEqual(result.returncode, ERROR)
                self.assertIn("No space left", result.stderr)

    def test_stdout_closed(self):
        server = self.server("size=64M", "todo=compact:0+8M")
        read_end, write_end = os.pipe()
        os.close(read_end)
        subprocess.run([QLEAN, "compact", server.socket], stdout=write_end, stderr=subprocess.DEVNULL, timeout=30)
        os.close(write_end)
        self.assertEqual(events(server.log(), "flush-end")[-1]["export"], "compact")

    def test_reader_that_has_enough(self):
        server = self.server("size=4G", "pattern=compact:128K:64K")
        said = subprocess.run(["sh", "-c", f'"$0" plan --map {server.socket} | head -n 1', QLEAN],
                              capture_output=True, text=True, timeout=60)
        self.assertEqual(len(said.stdout.splitlines()), 1)
        self.assertEqual(said.stderr, "qlean: cannot write to standard output: Broken pipe\n")

    def test_standard_descriptors_closed(self):
        # What is opened next would be the standard output, and its text would go into a pipe or the connection.
        server = self.server("size=64M", "todo=compact:0+8M")
        run = lambda words, closed: subprocess.run(["sh", "-c", f'"$0" {words} {server.socket} {closed}', QLEAN],
                                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                                   timeout=60)
        for command in ("plan", "compact --dry-run", "compact -q --json", "status"):
            failed = run(command, "<&- >&-")
            self.assertEqual(failed.returncode, ERROR, command)
            self.assertIn("cannot write to standard output: Bad file descriptor", failed.stderr, command)
        self.assertEqual(events(server.log(), "flush-end")[-1]["export"], "compact")
        self.assertEqual(run("compact --fast -q", "<&- >&- 2>&-").returncode, ERROR)  # it has a summary to print
        self.assertEqual(run("compact --dry-run", "<&-").returncode, DONE)

    def test_nobody_to_tell(self):
        for redirection in ("2>&-", "2>/dev/full"):
            code = subprocess.run(["sh", "-c", f'"$0" status {self.dir}/nosuch {redirection}', QLEAN], timeout=60).returncode
            self.assertEqual(code, ERROR, redirection)


main()
