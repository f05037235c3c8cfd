# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
"""--max-rate is exact within 5 %, measured by the server; --max-time stops in time and keeps the gains.

Times are compared beside what the machine itself did to them: where others keep it busy, nobody is on time.
"""

from harness import *


class Limits(Case):
    def measure(self, rate_text, rate, size, *settings, tail=0.0):
        server = self.server("size=1G", f"todo=compact:0+{size}", *settings)
        with Machine() as late:
            self.run_qlean("compact", "--no-zeroes", "--max-rate=" + rate_text, server.socket)
        total = late.total
        log = server.log()
        asked = events(log, "cache")
        # All requests but the first, over the time from the first to the last: no start-up time in it.
        seconds = asked[-1]["t"] - asked[0]["t"]
        measured = sum(e["length"] for e in asked[1:]) / seconds
        self.assertLess(abs(measured / rate - 1), 0.05 + 2 * late.worst / seconds,
                        f"{measured / M:.2f} MiB/s instead of {rate / M:.2f}")
        # And by the user's watch, but for the start and the end of the program; `tail`: what the server takes for the
        # last request and the last FLUSH.
        self.assertLess(size / rate, total * 1.05)
        self.assertLess(total - tail - 0.15, size / rate * 1.05 + late.seconds)
        # Never a burst: over no second more than a second's worth and one request.
        for i, first in enumerate(asked):
            burst = sum(e["length"] for e in asked[i:] if e["t"] < first["t"] + 1)
            self.assertLess(burst, rate * (1.05 + 2 * late.worst) + max(e["length"] for e in asked))
        server.stop()

    def test_rate_pipelined(self):
        self.measure("32M", 32 * M, 128 * M)

    def test_rate_with_a_slow_server(self):
        self.measure("16M", 16 * M, 64 * M, "cache-ms=100", "flush-ms=200", tail=0.3)

    def test_rate_one_at_a_time(self):
        self.measure("20M", 20 * M, 80 * M, "version=1.32.5", "cache-ms=20", "flush-ms=50")

    def test_low_rate(self):
        self.measure("512K", 512 * 1024, 2 * M + 512 * 1024)

    def test_rate_below_a_cluster_a_second(self):
        server = self.server("size=1G", "todo=compact:0+128K")
        with Machine() as late:
            self.run_qlean("compact", "--no-zeroes", "--max-rate=32K", server.socket)
        self.assertEqual([e["length"] for e in events(server.log(), "cache")], [64 * 1024] * 2)
        self.assertAlmostEqual(late.total, 4.0, delta=0.3 + late.seconds)

    def test_rate_holds_across_scattered_ranges(self):
        # Holes are nothing to do, so they are not paid for.
        server = self.server("size=512M", "pattern=compact:1M:128K")
        with Machine() as late:
            self.run_qlean("compact", "--no-zeroes", "--max-rate=32M", server.socket)
        self.assertAlmostEqual(late.total, 2.0, delta=0.3 + late.seconds)

    def test_time(self):
        server = self.server("size=1G", "todo=compact:0+1G", "cache-ms=100", "version=1.32.5")
        with Machine() as late:
            summary = self.run_json("compact", "--no-zeroes", "--max-time=1.5s", server.socket, code=STOPPED)
        self.assertAlmostEqual(late.total, 1.5, delta=0.5 + late.seconds)
        self.assertEqual(summary["stopped"], "max-time")
        compact = summary["operations"][0]
        self.assertGreater(compact["handled_bytes"], 0)
        self.assertEqual(compact["handled_bytes"] + compact["remaining_bytes"], compact["planned_bytes"])
        last = [e for e in server.log() if e["event"] in ("cache-end", "flush-end")][-1]
        self.assertEqual(last["event"], "flush-end")

    def test_time_while_the_guest_is_watched(self):
        server = self.server("size=64M", "todo=compact:0+8M", "guest-p99=100")
        with Machine() as late:
            summary = self.run_json("compact", "--max-time=0.2", server.socket, code=STOPPED)
        self.assertEqual(summary["stopped"], "max-time")
        self.assertLess(late.total, 0.8 + late.seconds)
        self.assertEqual(events(server.log(), "cache"), [])

    def test_beside_a_guest(self):
        # It begins slowly, with short requests and few of them; with --fast there is no guest.
        server = self.server("size=256M", "todo=compact:0+32M", "guest-p99=100", "cache-ms=5")
        begin = time.monotonic()
        self.run_qlean("compact", "--no-zeroes", server.socket)
        self.assertGreater(time.monotonic() - begin, 1.5)
        asked = events(server.log(), "cache")
        self.assertEqual(max(e["length"] for e in asked), M)
        self.assertLessEqual(max(e["in_flight"] for e in asked), 2)
        server.stop()
        self.setUp()
        server = self.server("size=256M", "todo=compact:0+32M", "guest-p99=100")
        with Machine() as late:
            self.run_qlean("compact", "--no-zeroes", "--fast", server.socket)
        self.assertLess(late.total, 1 + late.seconds)

    def test_time_that_is_enough(self):
        server = self.server("size=64M", "todo=compact:0+8M")
        self.assertIsNone(self.run_json("compact", "--max-time=1h", server.socket)["stopped"])

    def test_time_counts_for_all_operations_together(self):
        server = self.server("size=1G", "todo=zeroes:0+1G", "todo=compact:0+1G", "cache-ms=100", "version=1.32.5")
        with Machine() as late:
            summary = self.run_json("compact", "--max-time=4", server.socket, code=STOPPED)
        self.assertLess(late.total, 5 + late.seconds)
        # Each has its turn, and none is at its end.
        self.assertEqual([o["export"] for o in summary["operations"]], ["zeroes", "compact"])
        self.assertEqual(summary["stopped"], "max-time")
        for operation in summary["operations"]:
            self.assertGreater(operation["handled_bytes"], 0)
            self.assertLess(operation["handled_bytes"], operation["planned_bytes"])


main()
