# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
"""What a row measured, how it is held against its target, and the table.

A ratio is the median of the ratios of each round: two measurements that follow each other saw the same machine.
"""

import statistics

import servers


class Result:
    """Values of one row: contender -> one number per round. Contenders are "ours", "raw", "qemu-..." and others."""

    def __init__(self, row, unit, values, higher_is_better=True):
        self.row, self.unit, self.values, self.higher_is_better = row, unit, values, higher_is_better
        self.checks = []
        self.notes = []

    def median(self, name):
        return statistics.median(self.values[name])

    def best_qemu(self):
        names = [n for n in self.values if servers.is_qemu(n)]
        if not names:
            return None
        return (max if self.higher_is_better else min)(names, key=self.median)

    def ratio(self, name, other):
        pairs = [(a, b) for a, b in zip(self.values[name], self.values[other]) if b]
        return statistics.median(a / b for a, b in pairs) if pairs else float("inf")

    def _check(self, target, value, met, shown):
        self.checks.append({"target": target, "value": value, "met": met, "shown": shown})
        return self

    def at_least(self, limit, other, name="ours"):
        """Target: `name` is at least `limit` times as fast as `other` ("qemu" is the best of the qemu-nbds)."""
        real = self.best_qemu() if other == "qemu" else other
        if real is None or real not in self.values:
            return self
        value = self.ratio(name, real) if self.higher_is_better else self.ratio(real, name)
        return self._check(f">= {limit:.2f} x {other}", value, value >= limit, f"{value:.2f} x {real}")

    def at_most(self, limit, other, name="ours"):
        """Target: the value (a time, say) is at most `limit` times that of `other`."""
        value = self.ratio(name, other)
        return self._check(f"<= {limit:.2f} x {other}", value, value <= limit, f"{value:.2f} x {other}")

    def below(self, limit, name="ours"):
        value = self.median(name)
        return self._check(f"<= {limit:g} {self.unit}", value, value <= limit, f"{value:.3g} {self.unit}")

    def target(self, text, value, met, shown):
        return self._check(text, value, met, shown)

    def note(self, text):
        self.notes.append(text)
        return self

    def as_json(self):
        return {"row": self.row, "unit": self.unit, "higher_is_better": self.higher_is_better, "values": self.values,
                "medians": {n: self.median(n) for n in self.values}, "checks": self.checks, "notes": self.notes}


def number(value):
    if value >= 10000:
        return f"{value / 1000:.1f}k"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


HEAD = "| row | unit | ours | others | reached | target | met |\n| --- | --- | --- | --- | --- | --- | --- |"


def lines(result):
    """The row's lines of a Markdown table, one for each target."""
    others = ", ".join(f"{n} {number(result.median(n))}" for n in result.values if n != "ours")
    ours = number(result.median("ours")) if "ours" in result.values else ""
    first = f"| {result.row} | {result.unit} | {ours} | {others} |"
    checks = result.checks or [{"shown": "", "target": "", "met": None}]
    out = []
    for check in checks:
        met = {True: "yes", False: "**no**", None: ""}[check["met"]]
        out.append(f"{first} {check['shown']} | {check['target']} | {met} |")
        first = "| | | | |"
    out += [f"| {note} | | | | | | |" for note in result.notes]
    return "\n".join(out)
