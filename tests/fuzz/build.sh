#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# Usage: build.sh DIRECTORY TARGET... The build with clang, AddressSanitizer, UndefinedBehaviorSanitizer and what libFuzzer
# wants to know, in DIRECTORY/clang. Several tests share it: whoever comes second waits for the first.
set -euo pipefail
work=$1
shift
command -v clang++ >/dev/null || { echo "clang++ is not installed"; exit 77; }
mkdir -p "$work"
exec 9>"$work/lock"
flock 9
# Without what the address sanitizer sees as well, or a look at every pointer would find: a third of the time to build.
[ -f "$work/clang/build.ninja" ] || CXX=clang++ meson setup "$work/clang" "$(dirname "${BASH_SOURCE[0]}")/../.." \
    --buildtype=plain -Dwarning_level=0 -Db_sanitize=address,undefined -Db_lundef=false \
    -Dcpp_args="-O1 -gline-tables-only -fsanitize=fuzzer-no-link -fno-sanitize-recover=undefined
        -fno-sanitize=null,alignment,object-size,vptr"
ninja -C "$work/clang" "$@"
