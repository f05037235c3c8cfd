# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
"""SIGINT, SIGTERM, SIGHUP: what is in flight is answered, committed, and the connection closed as it should be."""

import signal

from harness import *

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may themselves run under nohup, whose wish qlean respects


class Signals(Case):
    def interrupt(self, number, name, version):
        server = self.server("size=1G", "todo=compact:0+1G", "cache-ms=300", "version=" + version)
        client = self.start_qlean("compact", "--no-zeroes", "--json", server.socket)
        wait_for(lambda: len(events(server.log(), "cache")) >= 2, "requests in flight")
        client.send_signal(number)
        stdout, _ = client.communicate(timeout=10)
        self.assertEqual(client.returncode, STOPPED)
        summary = json.loads(stdout)
        self.assertEqual(summary["stopped"], name)
        self.assertIsNotNone(summary["after"])
        log = server.log()
        started, ended = events(log, "cache"), events(log, "cache-end")
        self.assertEqual(len(started), len(ended))
        self.assertTrue(all(e["error"] == 0 for e in ended))
        self.assertEqual(summary["operations"][0]["handled_bytes"], sum(e["length"] for e in ended))
        order = [e["event"] for e in log if e["export"] == "compact" and e["event"] in ("cache-end", "flush-end", "close")]
        self.assertEqual(order[-2:], ["flush-end", "close"])
        self.assertIsNone(server.process.poll())
        server.stop()

    def test_drain(self):
        for number, name in ((signal.SIGINT, "SIGINT"), (signal.SIGTERM, "SIGTERM"), (signal.SIGHUP, "SIGHUP")):
            for version in ("1.40.0", "1.32.5"):
                with self.subTest(signal=name, version=version):
                    self.setUp()
                    self.interrupt(number, name, version)

    def test_while_waiting_for_the_rate(self):
        server = self.server("size=1G", "todo=compact:0+1G")
        client = self.start_qlean("compact", "--no-zeroes", "--max-rate=16K", server.socket)
        wait_for(lambda: events(server.log(), "cache"), "the first request", 20)
        with Machine() as late:  # the next is four seconds later
            client.send_signal(signal.SIGINT)
            stdout, _ = client.communicate(timeout=10)
        self.assertLess(late.total, 1 + late.seconds)
        self.assertEqual(client.returncode, STOPPED)
        self.assertIn("stopped early (SIGINT)", stdout)

    def test_while_reading_the_plan(self):
        server = self.server("size=64G", "todo=compact:0+1G", "extents-ms=200")
        for arguments in (["compact", "--no-zeroes"], ["compact", "--dry-run"], ["plan"]):
            with self.subTest(arguments=arguments):
                before = len(events(server.log(), "extents"))
                client = self.start_qlean(*arguments, server.socket)
                wait_for(lambda: len(events(server.log(), "extents")) > before + 1, "the second question")
                client.send_signal(signal.SIGTERM)
                client.communicate(timeout=2)
                self.assertEqual(client.returncode, STOPPED)
        self.assertEqual(events(server.log(), "cache"), [])

    def test_while_nothing_has_begun(self):
        # Accepts, and never says a word.
        path = os.path.join(self.dir, "silent")
        with socket.socket(socket.AF_UNIX) as silent:
            silent.bind(path)
            silent.listen()
            silent.settimeout(10)
            for arguments in (["compact"], ["compact", "--json"], ["compact", "-n"], ["plan"]):
                with self.subTest(arguments=arguments):
                    client = self.start_qlean(*arguments, path)
                    with silent.accept()[0]:
                        client.send_signal(signal.SIGINT)
                        _, stderr = client.communicate(timeout=2)
                    self.assertEqual(client.returncode, STOPPED)
                    self.assert_one_sentence(stderr, "stopped by a signal; nothing was begun")
            for arguments in (["compact"], ["compact", "-n"]):
                with self.subTest(arguments=arguments):
                    client = self.start_qlean(*arguments, "--max-time=0.5s", path)
                    with silent.accept()[0]:
                        _, stderr = client.communicate(timeout=10)
                    self.assertEqual(client.returncode, STOPPED)
                    self.assert_one_sentence(stderr, "stopped by --max-time; nothing was begun")

    def test_nohup(self):
        server = self.server("size=256M", "todo=compact:0+128M", "cache-ms=30", "version=1.32.5")
        client = self.start_qlean("compact", "--no-zeroes", server.socket,
                                  preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
        wait_for(lambda: events(server.log(), "cache"), "the first request")
        client.send_signal(signal.SIGHUP)
        client.communicate(timeout=20)
        self.assertEqual(client.returncode, DONE)

    def test_second_signal_does_not_wait(self):
        server = self.server("size=1G", "todo=compact:0+1G", "cache-ms=8000", "version=1.32.5")
        client = self.start_qlean("compact", "--no-zeroes", server.socket)
        wait_for(lambda: events(server.log(), "cache"), "the first request")
        client.send_signal(signal.SIGINT)
        with self.assertRaises(subprocess.TimeoutExpired):
            client.wait(0.5)
        client.send_signal(signal.SIGINT)
        self.assertEqual(client.wait(2), -signal.SIGINT)
        # The server survives it.
        self.run_qlean("status", server.socket)


main()
