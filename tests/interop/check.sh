#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# Usage: check.sh damaged [all]|online|kinds|marks. damaged: check.py. online: beside a guest nothing is found that is not
# there, and leaks are given back. kinds: beside a guest of images with other features, and with QEMU's numbers at the
# end. marks: images that are marked dirty or corrupt.
. "$(dirname "$0")/../lib.sh"
need qemu-img qemu-io jq

verdict() { "$QLEAN" check --json "$@" >"$W/verdict.json" 2>"$W/verdict.log"; }
number() { jq ".$1" "$W/verdict.json"; }

# expect_verdict CODE COMMAND...
expect_verdict() {
    local want=$1 rc=0
    shift
    verdict "$@" || rc=$?
    [ $rc = "$want" ] || fail "qlean check $*: $rc instead of $want: $(cat "$W/verdict.log" "$W/verdict.json")"
}

damaged() {
    mkdir "$W/d"
    "$PYTHON" "$TESTS/interop/check.py" "$QLEAN" "$W/d" "$@" || fail "see above"
}

online() {
    local cluster
    for cluster in 512 4096 65536; do
        create -o cluster_size=$cluster "$W/disk.qcow2" 64M
        rm -f "$W/model"
        start_server "$W/disk.qcow2"
        guest --model "$W/model" --requests 300 --largest 262144 >"$W/guest.log" 2>&1 || fail "$(cat "$W/guest.log")"
        # A server that is killed leaves leaks.
        guest_beside --model "$W/model" --connections 2 --largest 262144
        local checks
        for checks in 1 2 3 4 5 6 7 8; do expect_verdict 0 "$SOCK"; done
        guest_end
        nbdsh_do "$URI" 'h.pwrite(b"z" * 1048576, 0); h.flush(); h.pwrite(b"y" * 4194304, 32 << 20); h.trim(1 << 20, 0)'
        kill_server
        # What that left behind the last counted cluster is a leak as soon as there is a refcount block for it.
        start_server "$W/disk.qcow2"
        nbdsh_do "$URI" 'h.pwrite(b"x" * 1048576, 48 << 20); h.flush()'
        stop_server
        leak_some "$W/disk.qcow2"
        qemu-img convert -f qcow2 -O raw "$W/disk.qcow2" "$W/model"
        expect_verdict 3 "$W/disk.qcow2"
        local leaks
        leaks=$(number leaks)
        start_server "$W/disk.qcow2"
        guest_beside --model "$W/model" --connections 2 --largest 262144
        expect_verdict 3 "$SOCK"
        [ "$(number leaks)" = "$leaks" ] || fail "$(number leaks) leaks instead of $leaks"
        expect_verdict 0 --repair leaks "$SOCK"
        [ "$(number leaks_fixed)" = "$leaks" ] || fail "$(number leaks_fixed) leaks repaired instead of $leaks"
        expect_verdict 0 "$SOCK"
        guest_end
        expect_failure "repairing all beside a guest" "$QLEAN" check --repair all "$SOCK"
        # Nobody moves clusters beside a check, and the other way round.
        compact
        expect_verdict 0 "$SOCK"
        stop_server
        judge "$W/disk.qcow2" "$W/model"
        rm "$W/disk.qcow2"
    done
    start_read_only
}

# kind NAME OPTIONS: an image with these options is checked beside its guest, and at its end as QEMU does it
kind() {
    local image=$W/$1.qcow2 what checks
    create -o "$2" "$image" 32M
    [ "$1" != bitmaps ] || qemu-img bitmap --add -g 64k "$image" one
    if [ "$1" = compressed ]; then
        head -c 20M < <(yes "some text") >"$W/raw"
        truncate -s 32M "$W/raw"
        qemu-img convert -c -f raw -O qcow2 -o "$2" "$W/raw" "$image"
    fi
    qemu-img convert -f qcow2 -O raw "$image" "$W/model"
    start_server "$image"
    guest_beside --model "$W/model" --connections 2 --largest 262144
    for checks in 1 2 3 4 5; do expect_verdict 0 "$SOCK"; done
    guest_end >/dev/null
    expect_verdict 0 "$SOCK"
    stop_server
    judge "$image" "$W/model"
    [ "$1" != bitmaps ] || expect_verdict 0 "$image" # its bits got a place when the image was closed
    qemu-img check -f qcow2 --output=json "$image" >"$W/theirs.json"
    for what in image-end-offset total-clusters allocated-clusters fragmented-clusters compressed-clusters; do
        [ "$(number "${what//-/_}")" = "$(jq ".\"$what\" // 0" "$W/theirs.json")" ] || fail "$1: $what: $(cat "$W/verdict.json" "$W/theirs.json")"
    done
}

kinds() {
    kind plain cluster_size=65536
    kind v2 cluster_size=4096,compat=0.10
    kind refcounts1 cluster_size=4096,refcount_bits=1
    kind refcounts64 cluster_size=512,refcount_bits=64
    kind subclusters cluster_size=65536,extended_l2=on
    kind bitmaps cluster_size=4096
    kind data-file "cluster_size=65536,data_file=$W/data"
    kind raw-data-file "cluster_size=4096,data_file=$W/raw-data,data_file_raw=on"
    kind compressed cluster_size=65536
}

start_read_only() {
    create "$W/ro.qcow2" 16M
    qemu-io -f qcow2 -c 'write 0 1M' "$W/ro.qcow2" >/dev/null
    leak_some "$W/ro.qcow2"
    cp "$W/ro.qcow2" "$W/before"
    start_server "$W/ro.qcow2" -r
    expect_verdict 3 "$SOCK"
    expect_failure "repairing on a read-only server" "$QLEAN" check --repair leaks "$SOCK"
    stop_server
    cmp "$W/ro.qcow2" "$W/before" || fail "a read-only server changed the image"
    expect_verdict 0 --repair leaks "$W/ro.qcow2"
    [ "$(number leaks_fixed)" = 5 ] || fail "$(number leaks_fixed) leaks repaired instead of 5"
    judge "$W/ro.qcow2"
}

# leak_some IMAGE: five clusters at its end get a refcount, one of them more than one. Where the last refcount block ends
# with the file, free ones before it do.
leak_some() {
    PYTHONPATH=$TESTS/interop "$PYTHON" - "$1" <<'EOF'
import os, sys
from qcow2_file import Qcow2
with Qcow2(sys.argv[1]) as q:
    end = -(-q.length() // q.cluster)
    os.ftruncate(q.file.fileno(), (end + 8) * q.cluster)
    free = (c for c in [*range(end, end + 5), *range(end - 1, 0, -1)] if q.has_refcount(c) and q.refcount(c) == 0)
    for i in range(5):
        q.set_refcount(next(free), 3 if i == 2 else 1)
EOF
}

# A sync that failed is remembered with the file: what is cached of it may be on no disk. Whoever repairs begins as whoever
# serves: by asking the disk itself.
failed_sync() {
    create "$W/failed.qcow2" 16M
    leak_some "$W/failed.qcow2"
    "$PYTHON" -c 'import os, sys; os.setxattr(sys.argv[1], "user.qlean.failed-sync", b"1")' "$W/failed.qcow2" 2>/dev/null || return 0
    expect_verdict 3 "$W/failed.qcow2"
    expect_verdict 0 --repair leaks "$W/failed.qcow2"
    "$PYTHON" -c 'import os, sys; sys.exit("user.qlean.failed-sync" in os.listxattr(sys.argv[1]))' "$W/failed.qcow2" ||
        fail "repaired by what is cached after a failed sync"
}

marks_of() { qemu-img info -U --output=json "$1" | jq -c '."format-specific".data.corrupt, ."dirty-flag"' | tr '\n' ' '; }

# lazy: a guest of QEMU is killed with lazy refcounts, so that they are wrong
lazy() {
    create -o lazy_refcounts=on "$W/$1" 64M
    qemu-io -f qcow2 -c 'write -P 1 0 3M' "$W/$1" >/dev/null
    qemu-io -f qcow2 -c 'write -P 2 8M 3M' -c 'flush' -c 'abort' "$W/$1" >/dev/null 2>&1 || true
    [ "$(marks_of "$W/$1")" = 'false true ' ] || fail "QEMU left no dirty image: $(marks_of "$W/$1")"
}

marks() {
    lazy dirty.qcow2
    cp "$W/dirty.qcow2" "$W/before"
    # Read-only it is served as it is.
    start_server "$W/dirty.qcow2" -r
    qemu-io -r -f raw -c 'read -P 1 0 3M' -c 'read -P 2 8M 3M' "$URI" >"$W/io.txt" || fail "data: $(cat "$W/io.txt")"
    stop_server
    cmp "$W/dirty.qcow2" "$W/before" || fail "a read-only server changed the dirty image"
    expect_failure "repair=none" nbdkit -U - "$PLUGIN" file="$W/dirty.qcow2" repair=none --run true
    cmp "$W/dirty.qcow2" "$W/before" || fail "repair=none changed the dirty image"
    # Leaks are not what is wrong with it: counts that are too low would make the guest's clusters free.
    expect_failure "repair=leaks" nbdkit -U - "$PLUGIN" file="$W/dirty.qcow2" repair=leaks --run true
    grep -q 'repair=all' "$W/failed.txt" || fail "the sentence is: $(cat "$W/failed.txt")"
    cmp "$W/dirty.qcow2" "$W/before" || fail "repair=leaks changed the dirty image"
    qemu-img convert -f qcow2 -O raw "$W/before" "$W/model"
    # For writing it is repaired first.
    start_server "$W/dirty.qcow2"
    [ "$(marks_of "$W/dirty.qcow2")" = 'false null ' ] || [ "$(marks_of "$W/dirty.qcow2")" = 'false false ' ] || fail "still marked: $(marks_of "$W/dirty.qcow2")"
    guest --model "$W/model" --requests 100 >"$W/guest.log" 2>&1 || fail "$(cat "$W/guest.log")"
    stop_server
    judge "$W/dirty.qcow2" "$W/model"
    [ "$(qemu-img info --output=json "$W/dirty.qcow2" | jq '."format-specific".data."lazy-refcounts"')" = true ] || fail "lazy_refcounts is gone"

    lazy checked.qcow2
    expect_verdict 2 "$W/checked.qcow2"
    expect_verdict 0 --repair all "$W/checked.qcow2"
    [ "$(number corruptions_fixed)" -gt 0 ] || fail "nothing was repaired"
    judge "$W/checked.qcow2"

    create "$W/corrupt.qcow2" 64M
    qemu-io -f qcow2 -c 'write -P 1 0 3M' "$W/corrupt.qcow2" >/dev/null
    mark "$W/corrupt.qcow2" 2
    cp "$W/corrupt.qcow2" "$W/before"
    expect_failure "serving a corrupt image for writing" nbdkit -U - "$PLUGIN" file="$W/corrupt.qcow2" --run true
    grep -q 'marked corrupt' "$W/failed.txt" || fail "the sentence is: $(cat "$W/failed.txt")"
    start_server "$W/corrupt.qcow2" -r
    qemu-io -r -f raw -c 'read -P 1 0 3M' "$URI" >"$W/io.txt" || fail "data: $(cat "$W/io.txt")"
    stop_server
    cmp "$W/corrupt.qcow2" "$W/before" || fail "the refused image was changed"
    start_server "$W/corrupt.qcow2" repair=all
    nbdsh_do "$URI" 'h.pwrite(b"x" * 65536, 4 << 20)'
    stop_server
    judge "$W/corrupt.qcow2"
    [ "$(marks_of "$W/corrupt.qcow2" | cut -d' ' -f1)" = false ] || fail "still marked corrupt"

    failed_sync

    # Wrong use.
    local rc=0
    "$QLEAN" check --repair nothing "$W/corrupt.qcow2" >/dev/null 2>&1 || rc=$?
    [ $rc = 1 ] || fail "wrong use ends with $rc"
    rc=0
    "$QLEAN" check "$W/none.qcow2" >/dev/null 2>&1 || rc=$?
    [ $rc = 1 ] || fail "a missing file ends with $rc"
}

"$@"
