# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
"""Wrong command lines: exit code 2, an explanation, and nothing is done."""

import os

from harness import *


class Usage(Case):
    def refuse(self, *arguments, says=""):
        result = self.run_qlean(*arguments, code=USAGE)
        self.assertEqual(result.stdout, "")
        self.assertIn(says, result.stderr)

    def test_no_command(self):
        self.refuse(says="subcommand is required")

    def test_unknown_command(self):
        self.refuse("shrink", "x", says="'shrink'")
        self.refuse("--halp", says="'--halp'")
        self.refuse("snapshot", "remove", says="'remove'")

    def test_missing_target(self):
        for command in ("status", "plan", "compact", "serve"):
            self.refuse(command, says="is required")

    def test_unknown_option(self):
        self.refuse("status", "--frobnicate", "x")

    def test_rates_that_are_none(self):
        for rate in ("0", "-1", "fast", "10X", "1.2.3", "", "10MM", "nan", "0x10", "1e3", "99999999T", "K"):
            self.refuse("compact", "--max-rate=" + rate, "/nonexistent", says="--max-rate")

    def test_times_that_are_none(self):
        for duration in ("0", "soon", "10w", "-5", "1:30", "99999999d"):
            self.refuse("compact", "--max-time=" + duration, "/nonexistent", says="--max-time")

    def test_rates_that_are_some(self):
        # The command line is accepted and the target is looked at: exit code 1, not 2.
        for rate in ("1", "500K", "20M", "1.5G", "10MiB", "10MB", "2t", "100B"):
            result = self.run_qlean("compact", "--max-rate=" + rate, "/nonexistent", code=ERROR)
            self.assert_one_sentence(result.stderr, "/nonexistent")

    def test_not_an_nbd_uri(self):
        self.refuse("status", "http://example.com/", says="not an NBD URI")

    def test_check_has_other_codes(self):
        # 2 and 3 are corruptions and leaks: whatever else fails is 1.
        for arguments in (["http://example.com/"], ["/nonexistent"], ["--frobnicate", "x"], []):
            self.run_qlean("check", *arguments, code=ERROR)
        self.run_qlean("check", self.server("die-after=1").socket, code=ERROR)

    def test_help_and_version(self):
        self.assertIn("compact", self.run_qlean("--help").stdout)
        for command in ("status", "plan", "compact", "serve"):
            text = self.run_qlean(command, "--help").stdout
            self.assertIn("--", text)
            self.assertNotIn("{", text)
        self.assertRegex(self.run_qlean("--version").stdout, r"^qlean \d+\.\d+\.\d+\n$")

    def test_help_that_cannot_be_written(self):
        for option in ("--help", "--version"):
            with open("/dev/full", "w") as full:
                result = subprocess.run([QLEAN, option], stdout=full, stderr=subprocess.PIPE, text=True, timeout=10)
            self.assertEqual(result.returncode, ERROR)
            self.assert_one_sentence(result.stderr, "cannot write to standard output")

    def test_target_that_is_nothing(self):
        self.assert_one_sentence(self.run_qlean("status", self.dir, code=ERROR).stderr, self.dir, "neither")
        missing = os.path.join(self.dir, "missing")
        self.assert_one_sentence(self.run_qlean("plan", missing, code=ERROR).stderr, missing, "No such file")


main()
