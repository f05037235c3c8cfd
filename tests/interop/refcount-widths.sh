#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# Usage: refcount-widths.sh [CLUSTER_BITS...]. Images with refcounts of every width from 1 to 64 bits, made by qemu-img
# with these cluster sizes: served, written, trimmed, compacted beside the guest, judged, written by QEMU and served
# again. The smallest clusters make the refcount structures grow and move.
. "$(dirname "$0")/../lib.sh"
[ $# -gt 0 ] || set -- 9 12 16 21

cases=0
for bits in "$@"; do
    for width in 1 2 4 8 16 32 64; do
        cluster=$((1 << bits)) image=$W/$bits-$width.qcow2 at="clusters of $((1 << bits)), refcounts of $width bits"
        create -o cluster_size=$cluster,refcount_bits=$width "$image" 12M
        rm -f "$W/model"
        start_server --reclaim "$image"
        busy "$at" 150 --largest 131072
        stop_server
        judge "$image" "$W/model"
        # Blocks are linked ahead for 4 MiB: with clusters of 512 bytes and wide refcounts these are many.
        [ $(($(length "$image") * 100)) -le $((($(converted_length "$image") + 196608) * 102)) ] || fail "$at: $(length "$image") bytes are left"
        [ "$(qemu-img info --output=json "$image" | jq '."format-specific".data."refcount-bits"')" = $width ] || fail "$at: the width changed"
        qemu-io -f qcow2 -c 'write -P 77 1234944 100352' -c 'discard 4M 2M' -c 'write -P 3 8M 1M' "$image" >/dev/null
        again "$image" "$at" 40 --largest 131072
        rm "$image"
        cases=$((cases + 1))
    done
done
say "$cases images"
