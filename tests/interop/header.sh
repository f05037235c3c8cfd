#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# Headers with what we do not know: longer than 104 bytes, unknown extensions and unknown compatible bits are kept byte
# for byte, also when the header is rewritten because the L1 table moves; unknown autoclear bits are cleared before the
# first change and not before; an unknown incompatible bit is refused by its name.
. "$(dirname "$0")/../lib.sh"
header() { "$PYTHON" "$TESTS/interop/header.py" "$@"; }

for extra in 0 8 16 240 3000; do
    image=$W/$extra.qcow2
    create -o cluster_size=4096 "$image" 24M
    # The L1 table and the refcount structures end up behind data that is discarded.
    qemu-io -f qcow2 -c 'write -P 1 0 16M' "$image" >/dev/null
    qemu-img resize -q -f qcow2 "$image" 80G # moves the L1 table behind the data
    qemu-io -f qcow2 -c 'discard 0 15M' "$image" >/dev/null
    header craft "$image" $extra
    qemu-img check -q -f qcow2 "$image" || fail "$extra: the crafted image is not clean"
    cp "$image" "$W/before"
    # Reading changes nothing, served read-write too.
    start_server "$image"
    nbdsh_do "$URI" 'h.pread(4096, 0)'
    stop_server
    cmp "$image" "$W/before" || fail "$extra: reading changed the image"
    start_server "$image" -r
    nbdsh_do "$URI" 'h.pread(4096, 0)'
    stop_server
    cmp "$image" "$W/before" || fail "$extra: serving it read-only changed the image"
    start_server "$image"
    nbdsh_do "$URI" 'h.pwrite(b"x" * 4096, 17 << 20)'
    header same "$W/before" "$image" | grep -q 'autoclear=0x0' || fail "$extra: autoclear bits are set after a write"
    compact
    stop_server
    header same "$W/before" "$image" | grep -q 'l1_moved=True' || fail "$extra: the L1 table did not move"
    judge "$image"
    [ "$(qemu-img info --output=json "$image" | jq '."format-specific".data."lazy-refcounts"')" = true ] || fail "$extra: lazy_refcounts is gone"
    qemu-io -r -f qcow2 -c 'read -P 1 15M 1M' -c 'read -P 120 17M 4096' "$image" >"$W/io.txt" || fail "$extra: data: $(cat "$W/io.txt")"
    qemu-io -f qcow2 -c 'write -P 9 1M 64k' "$image" >/dev/null # QEMU still opens it for writing
    judge "$image"
done

create "$W/incompatible.qcow2" 16M
header incompatible "$W/incompatible.qcow2"
cp "$W/incompatible.qcow2" "$W/before"
for options in '' -r; do
    # shellcheck disable=SC2086
    expect_failure "an unknown incompatible bit" nbdkit -U - $options "$PLUGIN" file="$W/incompatible.qcow2" --run true
    grep -q "'tea leaves' (incompatible feature bit 17)" "$W/failed.txt" || fail "not by its name: $(cat "$W/failed.txt")"
done
cmp "$W/incompatible.qcow2" "$W/before" || fail "the refused image was changed"
