#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# Usage: cluster-sizes.sh 2|3 [CLUSTER_BITS...]. Images of this version of QCOW2, made by qemu-img with these cluster sizes
# (every one from 512 bytes to 2 MiB): served, written, trimmed, compacted beside the guest, judged, written by QEMU and served again.
. "$(dirname "$0")/../lib.sh"
compat=1.1
[ "${1:?version 2 or 3}" = 3 ] || compat=0.10
shift
# shellcheck disable=SC2046
[ $# -gt 0 ] || set -- $(seq 9 21)

for bits; do
    cluster=$((1 << bits)) image=$W/$bits.qcow2
    create -o compat=$compat,cluster_size=$cluster "$image" 24M
    rm -f "$W/model"
    start_server --reclaim "$image"
    busy $cluster 300 --largest 262144
    stop_server
    judge "$image" "$W/model"
    lean "$image" 102
    qemu-io -f qcow2 -c 'write -P 77 1234944 100352' -c 'discard 4M 4M' "$image" >/dev/null
    again "$image" $cluster 50 --largest 262144
    rm "$image"
done
