# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
"""Progress: one redrawn line on a terminal, plain lines elsewhere, never on stdout."""

import fcntl
import pty
import re
import select
import struct
import termios

from harness import *


class Progress(Case):
    def run_on_terminal(self, *arguments, columns=100):
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        process = subprocess.Popen([QLEAN, *arguments], stdout=subprocess.PIPE, stderr=slave, text=True)
        os.close(slave)
        chunks = []
        while True:
            ready, _, _ = select.select([master], [], [], 20)
            if not ready:
                break
            try:
                data = os.read(master, 65536)
            except OSError:
                break
            if not data:
                break
            chunks.append(data)
        stdout = process.stdout.read()
        process.stdout.close()
        os.close(master)
        self.assertEqual(process.wait(10), DONE)
        return stdout, b"".join(chunks).decode()

    def test_terminal(self):
        for columns in (100, 60, 30):
            with self.subTest(columns=columns):
                self.setUp()
                server = self.server("size=1G", "todo=compact:0+256M", "cache-ms=30", "version=1.32.5")
                stdout, text = self.run_on_terminal("compact", "--no-zeroes", server.socket, columns=columns)
                self.assertNotIn("MiB/s", stdout)
                bars = [l for l in re.split(r"[\r\n]", text) if "%" in l]
                # About 2 s: redrawn often, but not more than ten times a second.
                self.assertGreater(len(bars), 8)
                self.assertLess(len(bars), 30)
                for bar in bars:
                    self.assertLess(len(bar.replace("\x1b[K", "")), columns)
                if columns == 100:
                    self.assertRegex(bars[-1], r"compact  \[#+\.*\] +\d+\.\d%  \d+\.\d/256\.0 MiB  \d+\.\d MiB/s  ETA \d+:\d\d")
                    percents = [float(re.search(r"([\d.]+)%", b).group(1)) for b in bars]
                    self.assertEqual(percents, sorted(percents))
                    self.assertGreater(percents[-1], 85)
                self.assertRegex(text, r"compact: 256\.0 MiB of 256\.0 MiB in \d")
                self.assertEqual(text.count("\n"), 1, "one line stays")
                server.stop()

    def test_plain_lines(self):
        server = self.server("size=1G", "todo=compact:0+256M", "cache-ms=60", "version=1.32.5")
        result = self.run_qlean("compact", "--no-zeroes", server.socket)
        self.assertNotIn("\r", result.stderr)
        self.assertNotIn("\x1b", result.stderr)
        lines = result.stderr.splitlines()
        # Nearly 4 s: at most one line a second and one for the end.
        self.assertGreaterEqual(len(lines), 3)
        self.assertLessEqual(len(lines), 6)
        self.assertRegex(lines[0], r"^compact +\d+\.\d%  .* MiB/s  ETA \d+:\d\d$")
        self.assertRegex(lines[-1], r"^compact: 256\.0 MiB of 256\.0 MiB in ")

    def test_eta_is_about_right(self):
        server = self.server("size=1G", "todo=compact:0+128M", "cache-ms=100", "version=1.32.5")
        with Machine() as late:
            _, text = self.run_on_terminal("compact", "--no-zeroes", server.socket)
        shown = re.findall(r" (\d+\.\d)%  (\d+\.\d)/128\.0 MiB  (\d+\.\d) MiB/s  ETA (\d+):(\d\d)", text)
        half = [[float(word) for word in line] for line in shown if 45 <= float(line[0]) <= 55]
        self.assertTrue(half)
        etas = [minutes * 60 + seconds for _, _, _, minutes, seconds in half]
        # What is left, at the speed that is shown.
        for (_, done, speed, _, _), eta in zip(half, etas):
            self.assertAlmostEqual(eta, (128 - done) / speed, delta=1.1)
        # 32 requests of 100 ms: half of them, and what the machine was late.
        self.assertGreaterEqual(etas[0], 1)
        self.assertLessEqual(etas[0], 2 + late.seconds)

    def test_quiet(self):
        server = self.server("size=64M", "todo=compact:0+8M")
        self.assertEqual(self.run_qlean("compact", "-q", server.socket).stderr, "")

    def test_json_stdout_is_only_json(self):
        server = self.server("size=256M", "todo=compact:0+64M")
        stdout, _ = self.run_on_terminal("compact", "--json", server.socket)
        self.assertEqual(json.loads(stdout)["exit_code"], 0)


main()
