#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# sanitized.sh address|thread some|all: the engine with a sanitizer, in a build of its own; any report ends a test with an
# error. address is AddressSanitizer, LeakSanitizer and UndefinedBehaviorSanitizer. "some", what fits into every run:
# random workloads of several threads beside compaction, and killed ones; with address in the build of the fuzzers. "all":
# every program that runs the engine by itself, then what starts real servers, for which nbdkit is started with the
# sanitizer's runtime.
#
# "some" has UBSan without null, alignment, object-size and vptr (fuzz/build.sh): half of the time to compile. "all" has
# them, and compiles every file by itself, so that each includes what it needs.
set -euo pipefail
sanitizer=$1 amount=$2
tests=$(cd "$(dirname "$0")" && pwd)
build=$(cd "${QLEAN_BUILD:?}" && pwd)
to=$build/$sanitizer-$amount
case $sanitizer in address) with=address,undefined runtime=libasan.so ;; thread) with=thread runtime=libtsan.so ;; esac

case $amount in
some) unity=on targets=(tests/stress/stress tests/stress/killed) ;;
all) unity=off targets=(all) ;;
esac
if [ "$sanitizer $amount" = "address some" ]; then
    to=$build/fuzz/clang
    "$tests/fuzz/build.sh" "$build/fuzz" "${targets[@]}"
else
    {
        [ -f "$to/build.ninja" ] || meson setup "$to" "$tests/.." -Db_sanitize=$with -Db_lundef=false -Dbuildtype=plain -Dunity=$unity \
            -Ddebug=true -Doptimization=1 -Dcpp_args=-g1
        ninja -C "$to" "${targets[@]}"
    } >"$to.log" || { cat "$to.log"; exit 1; }
fi
echo "built after $SECONDS s"

export ASAN_OPTIONS=halt_on_error=1:exitcode=66:detect_stack_use_after_return=1
export UBSAN_OPTIONS=halt_on_error=1:exitcode=66:print_stacktrace=1
export TSAN_OPTIONS=halt_on_error=1:exitcode=66:second_deadlock_stack=1

# workloads SHAPE...: as in tests/stress; what only judges them comes from the ordinary build
workloads() { QLEAN_STRESS=$to/tests/stress "$tests/stress/workloads.sh" "$@"; }
# suites ARGUMENTS: tests of the build with the sanitizer
suites() { meson test -C "$to" --no-rebuild --print-errorlogs "$@" </dev/null; }

for shape in "512 16M" "4096 32M" "16384 32M extended_l2=on" "4096 32M cluster_size=4096 snapshot"; do
    read -r cluster size options snapshot <<<"$shape"
    for program in stress killed; do
        # shellcheck disable=SC2086 # an empty snapshot is no argument
        workloads $program "$cluster" "$size" 1 "${options:-cluster_size=$cluster}" $snapshot
    done
done
if [ "$amount" = all ]; then
    suites --suite unit --suite fault --suite regress --timeout-multiplier 10
    # nbdkit is not built with the sanitizer, so its runtime has to be there before the plugin; and libstdc++ with it, for
    # the runtime looks for what throws exceptions when it is loaded, and nbdkit has no C++. What nbdkit starts gets both,
    # and QEMU's coroutines do not bear it: so these are tests without `nbdkit --run`.
    mkdir -p "$to/bin"
    nbdkit=$(command -v nbdkit) runtime="$(gcc -print-file-name=$runtime) $(gcc -print-file-name=libstdc++.so)"
    printf '#!/bin/sh\nLD_PRELOAD="%s" exec %s "$@"\n' "$runtime" "$nbdkit" >"$to/bin/nbdkit"
    chmod +x "$to/bin/nbdkit"
    export ASAN_OPTIONS=$ASAN_OPTIONS:detect_leaks=0 # nbdkit's own, and Python's
    export QLEAN_TEST_PATH=$to/bin PATH=$to/bin:$PATH
    suites --suite stress --timeout-multiplier 10
    suites --timeout-multiplier 10 'interop sigterm' 'interop trim' 'interop subcluster-discard plain' 'interop resize' \
        'interop serve-modes plain' 'interop serve-modes connections' 'interop snapshots 65536' 'interop extended-l2 sizes' \
        'interop cluster-sizes 3' 'interop data-file off'
fi
echo "$sanitizer: no report, $SECONDS s"
