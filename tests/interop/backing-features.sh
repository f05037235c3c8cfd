#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# What lies below an image may use every feature of the format, and be marked dirty or corrupt: it is only read. An
# overlay may use them too.
. "$(dirname "$0")/../lib.sh"
need qemu-img qemu-io nbdcopy
cd "$W"
fill() { qemu-io -f qcow2 -c 'write -P 1 0 3M' -c 'write -P 2 3500k 100k' -c 'write -z 1M 300k' -c 'write -P 3 5M 1M' -c 'discard 5500k 64k' "$1" >/dev/null; }
# play IMAGE [QEMU'S OPTIONS]: a guest, its model, the judge; base.qcow2 stays as it is
play() {
    local before
    before=$(sha base.qcow2)
    rm -f model
    qemu-img convert -O raw "$1" model
    start_server "$W/$1"
    nbdcopy "$URI" out
    cmp model out || fail "$what: the server shows something else"
    rm out
    guest --model model --requests 120 --connections 2 --largest 300000 >guest.txt || fail "$what: $(cat guest.txt)"
    compact
    stop_server
    judge "$1" model
    [ "$(sha base.qcow2)" = "$before" ] || fail "$what: the base was changed"
    say "$what"
}
for what in plain compat=0.10 refcount_bits=1 refcount_bits=64 lazy_refcounts=on extended_l2=on data_file=ext.raw \
    data_file=ext.raw,data_file_raw=on cluster_size=512 cluster_size=2M; do
    rm -f ./*.qcow2 ./*.raw
    options=cluster_size=64k
    [ $what = plain ] || options=$what
    create -o "$options" base.qcow2 8M
    fill base.qcow2
    create -b base.qcow2 -F qcow2 top.qcow2 8M
    fill top.qcow2
    play top.qcow2
    case $what in *512 | *2M | *raw=on) continue ;; esac
    # The other way round.
    create base.qcow2 8M
    fill base.qcow2
    rm -f ext.raw
    create -o "$options" -b base.qcow2 -F qcow2 top.qcow2 9M
    fill top.qcow2
    what="$what above" play top.qcow2
done
for what in bitmap dirty corrupt; do
    create -o lazy_refcounts=on base.qcow2 8M
    fill base.qcow2
    case $what in
    bitmap) qemu-img bitmap --add base.qcow2 one ;;
    dirty) mark base.qcow2 1 ;;
    corrupt) mark base.qcow2 2 ;;
    esac
    create -u -b base.qcow2 -F qcow2 top.qcow2 8M
    play top.qcow2
done
