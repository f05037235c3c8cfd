#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# Usage: cluster-sizes.sh 2|3. Images of this version of QCOW2, made by qemu-img with every cluster size from 512 bytes to
# 2 MiB: served, written, trimmed, compacted beside the guest, judged, written by QEMU and served again.
. "$(dirname "$0")/../lib.sh"
compat=1.1
[ "${1:?version 2 or 3}" = 3 ] || compat=0.10

for bits in $(seq 9 21); do
    cluster=$((1 << bits)) image=$W/$bits.qcow2
    create -o compat=$compat,cluster_size=$cluster "$image" 24M
    rm -f "$W/model"
    start_server --reclaim "$image"
    guest --model "$W/model" --requests 300 --largest 262144 >"$W/guest.log" 2>&1 || fail "$cluster: $(cat "$W/guest.log")"
    guest_beside --model "$W/model" --largest 262144
    compact
    guest_end
    compact
    stop_server
    judge "$image" "$W/model"
    lean "$image" 102
    qemu-io -f qcow2 -c 'write -P 77 1234944 100352' -c 'discard 4M 4M' "$image" >/dev/null
    qemu-img convert -f qcow2 -O raw "$image" "$W/model"
    start_server "$image"
    guest --model "$W/model" --requests 50 --largest 262144 >"$W/guest.log" 2>&1 || fail "$cluster: after QEMU: $(cat "$W/guest.log")"
    stop_server
    judge "$image" "$W/model"
    rm "$image"
done
