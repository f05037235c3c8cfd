#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# Installs what is missing (Debian 12 or 13; as root or with sudo), builds into build/, runs every test except the long
# "soak" ones, and ends with one line: N passed, N failed. Arguments go to `meson test`. A test that this machine cannot
# run is named; with CI set it counts as failed, for there every test must have run.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
export LC_ALL=C

broken() {
    echo "$1" >&2
    echo "0 passed, 1 failed"
    exit 1
}

as_root=()
[ "$(id -u)" = 0 ] || as_root=(sudo --preserve-env=CI)
examples/install-deps.sh </dev/null || broken "The packages could not be installed."
[ -f build/build.ninja ] || meson setup build >/dev/null || broken "meson setup failed; see build/meson-logs/meson-log.txt."
ninja -C build -j "$(nproc)" || broken "The build failed."

"${as_root[@]}" rm -f build/meson-logs/run-*

# Runs tests of a suite or without some; their results go to build/meson-logs/run-NAME.json.
run() {
    local name=$1
    shift
    "${as_root[@]}" meson test -C build --logbase "run-$name" --no-rebuild --no-suite soak --print-errorlogs "$@" \
        </dev/null
    [ -s "build/meson-logs/run-$name.json" ] || broken "meson test left no results in build/meson-logs/run-$name.json."
}
at_a_time=$(($(nproc) * 3 / 2)) # more than processors: some tests wait most of their time
if [ $# != 0 ]; then
    run chosen --num-processes "$at_a_time" "$@"
else
    run together --num-processes "$at_a_time" --no-suite alone --no-suite fuzz
    # What is to be alone measures time, mounts, or starts whole systems. Beside that there is room for what computes.
    set -m # a process group of its own
    (renice -n 19 -p $BASHPID >/dev/null; run fuzz --num-processes 1 --suite fuzz) >build/run-fuzz.txt 2>&1 &
    fuzz=$!
    set +m
    trap '"${as_root[@]}" kill -- -$fuzz' EXIT
    run alone --suite alone
    wait $fuzz
    fuzzed=$?
    trap - EXIT # the number may be another's now
    cat build/run-fuzz.txt
    [ $fuzzed = 0 ] || broken "The fuzzers left no results."
fi

# One JSON object a line; the results are meson's own.
/usr/bin/python3 - "${CI:-}" build/meson-logs/run-*.json <<'END'
import json, sys
results = [json.loads(line) for log in sys.argv[2:] for line in open(log, encoding="utf-8")]
good = ("OK", "EXPECTEDFAIL")
skipped = [r["name"] for r in results if r["result"] == "SKIP"]
failed = [r["name"] for r in results if r["result"] not in good + ("SKIP",)]
for name in skipped:
    print(f"not run, this machine lacks something: {name}")
for name in failed:
    print(f"failed: {name}")
if sys.argv[1]:
    failed += skipped
passed = sum(r["result"] in good for r in results)
print(f"{passed} passed, {len(failed)} failed")
sys.exit(1 if failed or not passed else 0)
END
