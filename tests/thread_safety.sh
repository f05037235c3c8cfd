#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# thread_safety.sh: clang's thread safety analysis of every source. What is PROTECTED_BY a mutex (lib/thread_safety.h) is
# touched with that mutex held, or this fails; and it does fail for a source that does not hold it.
set -euo pipefail
cd "$(dirname "$0")/.."
source=$(pwd -P)
command -v clang++ >/dev/null || { echo "SKIP: clang++ is not installed"; exit 77; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
read -ra libraries < <(pkg-config --cflags fmt libcrypto libcryptsetup libnbd nbdkit nlohmann_json CLI11 libzstd zlib)
analyse() {
    clang++ -std=c++20 -fsyntax-only -Wthread-safety -Werror=thread-safety -D_GNU_SOURCE -D_FILE_OFFSET_BITS=64 \
        -DQLEAN_VERSION='""' -I"$source" "${libraries[@]}" "$@"
}

cat >"$work/careless.cpp" <<'SOURCE'
#include "lib/thread_safety.h"
struct Careless {
    qlean::Mutex mutex;
    int value PROTECTED_BY(mutex) = 0;
    int look() { return value; }
};
SOURCE
! analyse "$work/careless.cpp" 2>"$work/said" || { echo "FAILED: a member is read without its mutex, and clang does not mind"; exit 1; }
grep -q "requires holding mutex 'mutex'" "$work/said" || { cat "$work/said"; exit 1; }

# As the build compiles them: several together, where it does that.
cd "${QLEAN_BUILD:?}"
mapfile -t sources < <(jq -r '.[].file' compile_commands.json | xargs realpath | sort -u |
    grep -E "^($source|$(pwd -P))/(lib|plugin|filter|client)/")
[ "${#sources[@]}" -ge 10 ] || { echo "FAILED: only ${#sources[@]} sources found"; exit 1; }
failed=0
for file in "${sources[@]}"; do
    analyse "$file" || failed=1
done
[ $failed = 0 ] || exit 1
echo "ok: ${#sources[@]} sources, $SECONDS s"
