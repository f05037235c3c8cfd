#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# Internal snapshots of an image that lies on another: each export shows the bytes and the block status that the disk had
# when the snapshot was taken, with what lies below.
. "$(dirname "$0")/../lib.sh"
need qemu-img qemu-io nbdcopy nbdinfo
cd "$W"
map() { nbdinfo --map "$1" >"$2"; }
for options in cluster_size=64k cluster_size=4k compat=0.10 extended_l2=on; do
    rm -f ./*.qcow2
    create -o "$options" base.qcow2 6M # shorter than what lies on it
    qemu-io -f qcow2 -c 'write -P 1 0 3M' -c 'write -z 1M 320k' -c 'write -P 2 5M 64k' base.qcow2 >/dev/null
    create -o "$options" -b base.qcow2 -F qcow2 top.qcow2 9M
    qemu-io -f qcow2 -c 'write -P 3 512k 100k' -c 'write -z 2M 192k' -c 'write -P 4 7M 5k' top.qcow2 >/dev/null
    qemu-img convert -O raw top.qcow2 model
    start_server top.qcow2 -r
    map "$URI" map.txt
    stop_server
    qemu-img snapshot -c one top.qcow2
    # Nothing of the active disk is what it was.
    qemu-io -f qcow2 -c 'write -P 9 0 9M' top.qcow2 >/dev/null
    start_server top.qcow2
    uri=$(export_uri snapshot/one)
    map "$uri" map-of-snapshot.txt
    diff map.txt map-of-snapshot.txt || fail "$options: the snapshot's block status is not the disk's"
    grep -q hole,zero map.txt && grep -q data map.txt || fail "$options: the map shows nothing: $(cat map.txt)"
    nbdsh_do "$uri" 'h.cache(h.get_size(), 0)'
    nbdcopy "$uri" out
    cmp out model || fail "$options: the snapshot has other bytes"
    rm out
    stop_server
    judge top.qcow2
    say "$options"
done
