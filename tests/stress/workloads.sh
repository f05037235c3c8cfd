#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# workloads.sh stress|killed CLUSTER_SIZE DISK_SIZE COUNT [OPTIONS [snapshot]]: COUNT random workloads on images that
# qemu-img makes with these options, with a snapshot of a disk that has been used before if asked for, each judged by
# qemu-img check: after a clean end nothing may be wrong, after a kill nothing but leaks (exit status 3), which the next
# compaction frees. The seed of a workload that fails is printed; SEED=N repeats it.
set -eu
program=$1 cluster=$2 size=$3 count=$4 options=cluster_size=$2${5:+,$5}
build=${QLEAN_BUILD:?}
programs=${QLEAN_STRESS:-$build/tests/stress} # those of a build with a sanitizer, say
work=$(mktemp -d "${TMPDIR:-/tmp}/qlean-stress.XXXXXX")
trap 'rm -rf "$work"' EXIT
image=$work/disk.qcow2
snapshot=${6:-}
snapshot_bytes() { qemu-img convert -q -l snapshot.name=s -O raw "$image" "$1"; }
snapshot_stays() {
    snapshot_bytes "$work/now"
    cmp "$work/snapshot" "$work/now" || { echo "FAILED: seed $seed: the snapshot is not what it was"; exit 1; }
}
for _ in $(seq "$count"); do
    seed=${SEED:-$((RANDOM * 32768 + RANDOM))}
    qemu-img create -q -f qcow2 -o "$options" "$image" "$size"
    if [ -n "$snapshot" ]; then
        "$programs/killed" "$image" "$seed" 300 4
        qemu-img snapshot -c s "$image"
        snapshot_bytes "$work/snapshot"
    fi
    case $program in
    stress)
        "$programs/stress" "$image" "$seed" 1.5 4
        qemu-img check -q "$image" || { echo "FAILED: seed $seed: qemu-img check"; exit 1; }
        ;;
    killed) # twice the same image: the second server inherits what the first left
        for round in 1 2; do
            "$programs/killed" "$image" "$((seed + round))" $((300 + RANDOM % 900)) 4
            status=0
            qemu-img check "$image" >"$work/check" 2>&1 || status=$?
            case $status in 0 | 3) ;; *)
                tail -5 "$work/check"
                echo "FAILED: seed $seed round $round: qemu-img check says $status"
                exit 1
                ;;
            esac
            [ -z "$snapshot" ] || snapshot_stays
        done
        "$build/client/qlean" compact --no-zeroes "$image" >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
        qemu-img check -q "$image" || { echo "FAILED: seed $seed: not clean after compaction"; exit 1; }
        ;;
    esac
    if [ -n "$snapshot" ]; then
        snapshot_stays
        "$build/client/qlean" snapshot delete "$image" s >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
        qemu-img check -q "$image" || { echo "FAILED: seed $seed: not clean after the snapshot was deleted"; exit 1; }
    fi
    rm "$image"
done
