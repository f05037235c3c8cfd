#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
"""Measures qlean against `nbdkit file`, qemu-nbd, `qemu-img convert` and a mirror job, side by side in the same run.

Contenders take turns (A B C, B C A, C A B); medians; prints the table of tests/bench/README.md and writes JSON.
"""

import argparse
import datetime
import itertools
import json
import os
import platform
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import traceback

sys.dont_write_bytecode = True
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)

import results  # noqa: E402
import rows_io  # noqa: E402
import rows_maintenance  # noqa: E402

GROUPS = {**rows_io.ROWS, **rows_maintenance.ROWS}


class Context:
    """What every row needs to know; owns the scratch directory."""

    def __init__(self, args, directory):
        self.short, self.with_filter = args.short, args.with_filter
        self.rounds = args.rounds or (1 if args.short else 3)
        self.runtime = args.runtime or (0.4 if args.short else 2)
        self.compact_options = shlex.split(args.compact_options)
        self.only = [word.lower() for word in args.rows.split(",")] if args.rows else None
        self.dir = directory
        self.numbers = itertools.count(1)
        self.seeds = itertools.count(int(time.time()))
        self.qemu = {"qemu-nbd": ["qemu-nbd"], "qemu-nbd io_uring": ["qemu-nbd", "--aio=io_uring"]}
        for given in args.qemu_nbd:
            name, _, command = given.partition("=")
            if not name.startswith("qemu") or not command:
                sys.exit(f"bench.py: --qemu-nbd={given}: NAME=COMMAND is expected, and NAME must begin with \"qemu\"")
            self.qemu[name] = shlex.split(command)

    def use(self, build):
        self.build = build
        self.plugin = os.path.join(build, "plugin/nbdkit-qcow2-plugin.so")
        self.filter = os.path.join(build, "filter/nbdkit-reclaim-filter.so")
        self.qlean = os.path.join(build, "client/qlean")
        for path in (self.plugin, self.filter, self.qlean):
            if not os.path.exists(path):
                sys.exit(f"bench.py: {path} is missing; run ninja in {build} first")

    def path(self, name):
        return os.path.join(self.dir, name)

    def serial(self):
        return next(self.numbers)

    def seed(self):
        return next(self.seeds)

    @staticmethod
    def slug(name):
        return re.sub(r"[^a-z0-9]+", "-", name.lower())

    def wants(self, title):
        """--rows names groups, or parts of titles."""
        return self.only is None or self.group in self.only or any(word in title.lower() for word in self.only)


def first_line(*command):
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return done.stdout.splitlines()[0] if done.stdout else "?"
    except OSError as error:
        return str(error)


def build_release(directory):
    """A release build of what is measured, nothing else."""
    build = os.path.join(directory, "build")
    top = os.path.dirname(os.path.dirname(HERE))
    print("building a release in the scratch directory ...", file=sys.stderr)
    for command in (["meson", "setup", "-Dbuildtype=release", build, top],
                    ["ninja", "-C", build, "plugin/nbdkit-qcow2-plugin.so", "filter/nbdkit-reclaim-filter.so",
                     "client/qlean"]):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            sys.exit(f"bench.py: {' '.join(command)} failed:\n{done.stdout}")
    return build


def build_type(build):
    try:
        with open(os.path.join(build, "meson-info/intro-buildoptions.json")) as f:
            return next(option["value"] for option in json.load(f) if option["name"] == "buildtype")
    except (OSError, StopIteration):
        return "unknown"


def environment(ctx):
    with open("/proc/cpuinfo") as f:
        models = [line.split(":")[1].strip() for line in f if line.startswith("model name")]
    with open("/proc/meminfo") as f:
        memory = int(f.readline().split()[1]) // 1024
    top = os.path.dirname(os.path.dirname(HERE))
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        "machine": f"{os.cpu_count()} x {models[0] if models else platform.machine()}, {memory} MiB",
        "kernel": platform.release(),
        "file system": first_line("findmnt", "-no", "FSTYPE,OPTIONS", "-T", ctx.dir),
        "versions": {"qlean": first_line(ctx.qlean, "--version"),
                     "commit": first_line("git", "-C", top, "describe", "--always", "--dirty"),
                     "nbdkit": first_line("nbdkit", "--version"), "fio": first_line("fio", "--version"),
                     "qemu-img": first_line("qemu-img", "--version"),
                     **{name: first_line(*command, "--version") for name, command in ctx.qemu.items()}},
        "build type": build_type(ctx.build),
        "command": " ".join(shlex.quote(word) for word in sys.argv),
        "rounds": ctx.rounds, "seconds each": ctx.runtime, "reclaim filter": ctx.with_filter,
    }


def cpu():
    """Seconds that all CPUs were busy, and that we and our ended children used; kernel threads count as others."""
    with open("/proc/stat") as f:
        fields = [int(word) for word in f.readline().split()[1:]]
    busy = (sum(fields[:3]) + sum(fields[5:8])) / os.sysconf("SC_CLK_TCK")
    own = sum(getattr(resource.getrusage(who), field) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
              for field in ("ru_utime", "ru_stime"))
    return busy, own


def run(ctx, names):
    done, failed = [], []
    print(results.HEAD, flush=True)
    for name in names:
        ctx.group = name
        begin, (busy, own) = time.monotonic(), cpu()
        group = []
        try:
            for result in GROUPS[name](ctx):
                group.append(result)
                print(results.lines(result), flush=True)
        except Exception as error:  # one group that fails must not cost the figures of the others
            traceback.print_exc()
            failed.append({"group": name, "error": str(error)})
        seconds, (busy2, own2) = time.monotonic() - begin, cpu()
        others = max(0.0, (busy2 - busy) - (own2 - own)) / seconds
        print(f"{name}: {seconds:.0f} s; others kept {others:.1f} of {os.cpu_count()} CPUs busy", file=sys.stderr)
        for result in group:
            done.append({"group": name, "cpus_busy_with_others": round(others, 2), **result.as_json()})
    return done, failed


def selected(ctx):
    """A word of --rows that is no group may be part of a title of any group that filters by title."""
    if ctx.only is None:
        return list(GROUPS)
    if all(word in GROUPS for word in ctx.only):
        return [name for name in GROUPS if name in ctx.only]
    return [name for name in GROUPS if name in ctx.only or name in ("steady", "fresh", "discards", "opening")]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help=f"comma-separated groups ({', '.join(GROUPS)}) or parts of row titles")
    parser.add_argument("--short", action="store_true", help="small images, one round, under two minutes")
    parser.add_argument("--rounds", type=int, help="rounds (default 3; 1 with --short)")
    parser.add_argument("--runtime", type=float, help="seconds for each fio run (default 2; 0.4 with --short)")
    parser.add_argument("--build", help="a build directory (default: a release build is made in the scratch directory)")
    parser.add_argument("--dir", help="where the scratch directory is made (default: TMPDIR or /var/tmp)")
    parser.add_argument("--json", help="write everything to this file")
    parser.add_argument("--with-filter", action="store_true", help="serve ours with the reclaim filter")
    parser.add_argument("--compact-options", default="", help="for `qlean compact` in the guest rows, such as --fast")
    parser.add_argument("--qemu-nbd", action="append", default=[], metavar="NAME=COMMAND",
                        help="one more qemu-nbd to measure, such as qemu-nbd-10=/opt/qemu10/bin/qemu-nbd")
    return parser.parse_args()


def main():
    args = arguments()
    missing = [tool for tool in ("nbdkit", "fio", "qemu-nbd", "qemu-img", "qemu-storage-daemon", "fallocate")
               if not shutil.which(tool)]
    if missing:
        sys.exit(f"bench.py: not found: {', '.join(missing)}; install nbdkit, fio, qemu-utils, qemu-system-common")
    scratch = tempfile.mkdtemp(prefix="qlean-bench-", dir=args.dir or os.environ.get("TMPDIR") or "/var/tmp")
    try:
        ctx = Context(args, scratch)
        names = selected(ctx)
        ctx.use(os.path.abspath(args.build) if args.build else build_release(scratch))
        if build_type(ctx.build) not in ("release", "debugoptimized"):
            print(f"bench.py: {ctx.build} is a {build_type(ctx.build)} build: the figures mean little", file=sys.stderr)
        where = environment(ctx)
        done, failed = run(ctx, names)
        where["load afterwards"] = os.getloadavg()
        missed = [(r["row"].strip(), c["target"], c["shown"]) for r in done for c in r["checks"] if not c["met"]]
        checks = sum(len(r["checks"]) for r in done)
        print(f"\n{checks} targets, {checks - len(missed)} met, {len(missed)} missed, {len(failed)} groups failed")
        if args.json:
            with open(args.json, "w") as f:
                json.dump({"environment": where, "rows": done, "failed": failed}, f, indent=1)
                f.write("\n")
        # A missed target is a finding, not a failure: only a row that could not be measured is one.
        return 1 if failed or not done else 0
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
