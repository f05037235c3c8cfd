#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# Usage: fuzz.sh TARGET SECONDS [LIBFUZZER-OPTION...]. Builds the targets with clang in BUILD/fuzz/clang, and runs one,
# beginning with tests/fuzz/corpus/TARGET and with what earlier runs found new (BUILD/fuzz/TARGET). An input that should
# not be is left in BUILD/fuzz, and the line that replays it is the last one printed.
set -euo pipefail
target=$1 seconds=$2
shift 2
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=${QLEAN_BUILD:-$here/../../build}/fuzz

mkdir -p "$work/$target"
"$here/build.sh" "$work" tests/fuzz/fuzz-{decoders,image,texts}

longest=1024 # operations beyond that are not looked at
[ "$target" = fuzz-image ] || longest=16384
program=$work/clang/tests/fuzz/$target
export ASAN_OPTIONS=quarantine_size_mb=8:malloc_context_size=6
# Entropic weights cost a fifth of the time here.
if "$program" "$work/$target" "$here/corpus/$target" -max_total_time="$seconds" -timeout=30 -rss_limit_mb=2048 \
    -max_len="$longest" -entropic=0 -print_final_stats=1 -artifact_prefix="$work/$target-" "$@"; then
    exit 0
fi
newest=$(find "$work" -maxdepth 1 -name "$target-*" -type f -printf '%T@ %p\n' | sort -n | tail -1 | cut -d' ' -f2-)
echo "again: $program $newest"
exit 1
