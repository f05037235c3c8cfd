# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
"""compact when all goes well: order, sizes and number of requests, the end of the loop, the summary."""

from harness import *


class Compact(Case):
    def assert_covers(self, server, export, ranges):
        """Every range was asked for exactly once, in pieces of at most 16 MiB."""
        asked = sorted((e["offset"], e["length"]) for e in events(server.log(), "cache", export))
        for offset, length in asked:
            self.assertLessEqual(length, 16 * M)
        units = [u for offset, length in asked for u in range(offset // 65536, (offset + length) // 65536)]
        self.assertEqual(len(units), len(set(units)), "asked twice")
        for offset, length in ranges:
            self.assertTrue(set(range(offset // 65536, (offset + length) // 65536)) <= set(units))

    def test_operations_in_order(self):
        server = self.server("size=256M", "exports=compact,zeroes,reclaim", "todo=compact:0+64M", "todo=zeroes:64M+64M",
                             "todo=reclaim:1M+1M")
        summary = self.run_json("compact", server.socket)
        self.assertEqual([o["export"] for o in summary["operations"]], ["reclaim", "zeroes", "compact"])
        order = [e["export"] for e in events(server.log(), "cache")]
        self.assertEqual(order, sorted(order, key=["reclaim", "zeroes", "compact"].index))
        self.assert_covers(server, "compact", [(0, 64 * M)])
        self.assert_covers(server, "zeroes", [(64 * M, 64 * M)])
        self.assert_covers(server, "reclaim", [(M, M)])
        for operation, size in zip(summary["operations"], (M, 64 * M, 64 * M)):
            self.assertEqual(operation["planned_bytes"], size)
            self.assertEqual(operation["handled_bytes"], size)
            self.assertEqual(operation["remaining_bytes"], 0)
            self.assertEqual(operation["passes"], 1)
            self.assertGreaterEqual(operation["flushes"], 1)
        self.assertIsNone(summary["stopped"])
        self.assertIsNone(summary["error"])
        self.assertEqual(summary["exit_code"], 0)
        self.assertGreater(summary["before"]["length"], summary["after"]["length"])
        self.assertEqual(summary["before"]["fragmentation_percent"], 50)
        self.assertEqual(summary["after"]["fragmentation_percent"], 0)

    def test_no_zeroes(self):
        server = self.server("size=64M", "todo=zeroes:0+64M", "todo=compact:0+1M")
        self.run_qlean("compact", "--no-zeroes", server.socket)
        self.assertEqual({e["export"] for e in events(server.log(), "cache")}, {"compact"})

    def test_server_without_zeroes(self):
        server = self.server("size=64M", "exports=compact", "todo=compact:0+1M")
        self.assertEqual([o["export"] for o in self.run_json("compact", server.socket)["operations"]], ["compact"])

    def test_pipelined_but_never_above_fifteen(self):
        server = self.server("size=1G", "todo=compact:0+512M", "cache-ms=20", "flush-ms=30")
        self.run_qlean("compact", server.socket)
        most = max(e["in_flight"] for e in server.log())
        self.assertLessEqual(most, 15)
        self.assertGreaterEqual(most, 12)
        self.assert_covers(server, "compact", [(0, 512 * M)])

    def test_one_at_a_time_against_old_nbdkit(self):
        for version in ("1.32.5", ""):
            with self.subTest(version=version):
                self.setUp()
                server = self.server("size=256M", "todo=compact:0+128M", "version=" + version, "cache-ms=2")
                self.run_qlean("compact", server.socket)
                self.assertEqual(max(e["in_flight"] for e in server.log()), 1)
                self.assert_covers(server, "compact", [(0, 128 * M)])
                server.stop()

    def test_flush_as_we_go_and_last(self):
        for version in ("1.32.5", "1.40.0"):
            with self.subTest(version=version):
                self.setUp()
                server = self.server("size=1G", "todo=compact:0+512M", "version=" + version, "cache-ms=3", "flush-ms=20")
                self.run_qlean("compact", "--no-zeroes", server.socket)
                log = server.log()
                uncommitted = 0
                for e in log:
                    if e["event"] == "cache-end":
                        uncommitted += e["length"]
                    elif e["event"] == "flush":
                        covered = uncommitted
                    elif e["event"] == "flush-end":
                        uncommitted -= covered
                    self.assertLessEqual(uncommitted, 64 * M)
                self.assertEqual(uncommitted, 0, "the last request is a FLUSH")
                self.assertLessEqual(len(events(log, "flush")), 512 // 32 + 2)
                server.stop()

    def test_scattered_ranges_share_requests(self):
        server = self.server("size=1G", "pattern=compact:512K:64K")
        summary = self.run_json("compact", "--no-zeroes", server.socket)
        requests = events(server.log(), "cache")
        self.assertLessEqual(len(requests), 1024 // 15 + 1)
        self.assert_covers(server, "compact", [(i * 524288, 65536) for i in range(2048)])
        self.assertEqual(summary["operations"][0]["handled_bytes"], 2048 * 65536)

    def test_wide_where_the_server_bounds_a_request(self):
        for version in ("1.32.5", "1.40.0"):
            with self.subTest(version=version):
                self.setUp()
                server = self.server("size=1G", "pattern=compact:512K:64K", "most-by-request=8M", "version=" + version)
                summary = self.run_json("compact", "--no-zeroes", server.socket)
                requests = events(server.log(), "cache")
                # One range for all that is to do, as often as it takes, one at a time; nothing is left for a second pass.
                self.assertEqual({(e["offset"], e["length"]) for e in requests}, {(0, 1024 * M - 512 * 1024 + 65536)})
                self.assertEqual(len(requests), 128 // 8)
                self.assertEqual(max(e["in_flight"] for e in server.log()), 1)
                self.assertEqual(summary["operations"][0]["handled_bytes"], 128 * M)
                self.assertEqual(summary["operations"][0]["passes"], 1)
                server.stop()

    def test_wide_beyond_one_request(self):
        server = self.server("size=20G", "todo=compact:0+64K", "todo=compact:3G+64M", "todo=compact:9G+64K",
                             "todo=compact:19G+1G", "most-by-request=512M")
        summary = self.run_json("compact", "--no-zeroes", server.socket)
        requests = [(e["offset"], e["length"]) for e in events(server.log(), "cache")]
        for offset, length in requests:
            self.assertLess(length, 1 << 32)
        self.assertEqual(len(requests), 4)  # 0 with 3G, 9G, and 19G twice
        self.assertEqual(summary["operations"][0]["remaining_bytes"], 0)

    def test_what_a_wide_pass_leaves_is_done_piece_by_piece(self):
        server = self.server("size=1G", "todo=compact:0+512M", "most-by-request=65536", "cache-ms=1")
        summary = self.run_json("compact", "--no-zeroes", server.socket)
        # At least 1 MiB is believed of a request, and this server does 64 KiB: so the wide pass, of 512 requests, does
        # 32 MiB. Those of the passes after it, piece by piece, do 64 KiB each as well, and there are many.
        lengths = [e["length"] for e in events(server.log(), "cache")]
        self.assertEqual(lengths[:512], [512 * M] * 512)
        self.assertLessEqual(max(lengths[512:]), 16 * M)
        self.assertGreater(summary["operations"][0]["passes"], 2)
        self.assertEqual(summary["operations"][0]["remaining_bytes"], 0)

    def test_a_wide_pass_that_gains_nothing_is_not_the_end(self):
        server = self.server("size=64M", "todo=compact:0+48M", "most-by-request=32M", "stuck-from=32M")
        summary = self.run_json("compact", "--no-zeroes", server.socket)
        lengths = [e["length"] for e in events(server.log(), "cache")]
        self.assertEqual(lengths[:2], [48 * M] * 2)
        self.assertLessEqual(max(lengths[2:]), 16 * M)
        self.assertEqual(summary["operations"][0]["remaining_bytes"], 0)
        self.assertIsNone(summary["operations"][0]["note"])

    def test_a_guest_that_comes_during_a_wide_pass(self):
        server = self.server("size=1G", "todo=compact:0+512M", "most-by-request=1M", "cache-ms=10", "guest-p99=100",
                             "guest-after=20")
        summary = self.run_json("compact", "--no-zeroes", server.socket)
        lengths = [e["length"] for e in events(server.log(), "cache")]
        wide = lengths.count(512 * M)
        self.assertLessEqual(20, wide)
        self.assertLess(wide, 512)
        self.assertLessEqual(max(lengths[wide:]), 4 * M)
        self.assertEqual(summary["operations"][0]["remaining_bytes"], 0)

    def test_beside_a_guest_and_under_a_limit_piece_by_piece(self):
        for setting, option in (("guest-p99=100", []), ("pending=0", ["--max-rate", "1G"])):
            with self.subTest(setting=setting):
                self.setUp()
                server = self.server("size=64M", "todo=compact:0+16M", "most-by-request=32M", setting)
                self.run_qlean("compact", "--no-zeroes", *option, server.socket)
                self.assert_covers(server, "compact", [(0, 16 * M)])
                for e in events(server.log(), "cache"):
                    self.assertLessEqual(e["length"], 4 * M)
                server.stop()

    def test_distant_ranges_do_not(self):
        server = self.server("size=1G", "todo=compact:0+64K", "todo=compact:512M+64K")
        self.run_qlean("compact", "--no-zeroes", server.socket)
        # Both are on their way at once: which one the server takes first is its affair.
        self.assertEqual(sorted((e["offset"], e["length"]) for e in events(server.log(), "cache")),
                         [(0, 65536), (512 * M, 65536)])

    def test_nothing_to_do_sends_nothing(self):
        server = self.server("size=64M")
        summary = self.run_json("compact", server.socket)
        self.assertEqual(events(server.log(), "cache"), [])
        self.assertEqual([o["passes"] for o in summary["operations"]], [0, 0])

    def test_pending_metadata_moves_with_flush_alone(self):
        server = self.server("size=64M", "pending=100", "pending-step=16")
        summary = self.run_json("compact", server.socket)
        self.assertEqual(events(server.log(), "cache"), [])
        self.assertEqual(len(events(server.log(), "flush", "compact")), 7)
        self.assertEqual(summary["operations"][-1]["pending_clusters"], 0)
        self.assertIsNone(summary["operations"][-1]["note"])

    def test_a_pass_without_gain_is_the_end(self):
        server = self.server("size=64M", "todo=compact:0+8M", "stuck=compact")
        summary = self.run_json("compact", server.socket)
        compact = summary["operations"][-1]
        self.assertEqual(compact["passes"], 1)
        self.assertEqual(compact["remaining_bytes"], 8 * M)
        self.assertIn("8.0 MiB left", compact["note"])
        self.assertIn("gained nothing", self.run_qlean("compact", server.socket).stdout)

    def test_an_error_from_before_explains_no_pass_without_gain(self):
        server = self.server("size=64M", "todo=compact:0+8M", "stuck=compact", "stale-error=disk.qcow2: long ago")
        note = self.run_json("compact", server.socket)["operations"][-1]["note"]
        self.assertIn("the guest is using it just now", note)

    def test_an_error_from_before_explains_no_failure(self):
        server = self.server("size=64M", "todo=compact:0+8M", "error-after=1:EIO", "stale-error=disk.qcow2: long ago")
        failed = self.run_qlean("compact", server.socket, code=ERROR)
        self.assertIn("Input/output error", failed.stderr)
        self.assertNotIn("long ago", failed.stderr)

    def test_pending_that_does_not_move_is_the_end(self):
        server = self.server("size=64M", "pending=5", "pending-step=0")
        summary = self.run_json("compact", server.socket)
        self.assertEqual(summary["operations"][-1]["pending_clusters"], 5)
        self.assertIn("5 clusters of metadata", summary["operations"][-1]["note"])

    def test_dry_run_touches_nothing(self):
        server = self.server("size=64M", "todo=compact:0+8M", "todo=zeroes:0+16M", "pending=5")
        summary = self.run_json("compact", "--dry-run", server.socket)
        self.assertEqual([(o["export"], o["planned_bytes"]) for o in summary["operations"]],
                         [("zeroes", 16 * M), ("compact", 8 * M)])
        self.assertEqual(summary["estimated_length"], 100 * 65536)
        text = self.run_qlean("compact", "--dry-run", server.socket).stdout
        self.assertIn("nothing was changed", text)
        self.assertEqual(events(server.log(), "cache") + events(server.log(), "flush"), [])

    def test_summary_for_people(self):
        server = self.server("size=64M", "todo=compact:0+8M")
        text = self.run_qlean("compact", server.socket).stdout
        self.assertRegex(text, r"file length +65\.0 MiB +6\.2 MiB +-58\.8 MiB")
        self.assertRegex(text, r"fragmentation +50\.00 % +0\.00 %")

    def test_maintenance_exports_are_never_read(self):
        server = self.server("size=64M", "todo=compact:0+8M")
        self.run_qlean("compact", server.socket)
        self.assertEqual(events(server.log(), "pread"), [])

    def test_resume_is_running_again(self):
        server = self.server("size=256M", "todo=compact:0+128M", "cache-ms=50")
        first = self.run_json("compact", "--no-zeroes", "--max-time=0.3", "--max-rate=100M", server.socket, code=STOPPED)
        done = first["operations"][0]["handled_bytes"]
        self.assertGreater(done, 0)
        second = self.run_json("compact", "--no-zeroes", server.socket)
        self.assertEqual(second["operations"][0]["planned_bytes"], 128 * M - done)


main()
