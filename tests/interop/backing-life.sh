#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# A chain in the hands of QEMU and of the server by turns: overlays made, written, rebased, committed, flattened; with the
# reclaim filter; a raw disk on a block device below; what a killed server leaves.
. "$(dirname "$0")/../lib.sh"
need qemu-img qemu-io nbdcopy
cd "$W"
same() { # same IMAGE: the server shows what qemu-img convert shows
    qemu-img convert -U -O raw "$1" model
    start_server "$W/$1" "${@:2}"
    nbdcopy "$URI" out
    cmp model out || fail "$1: the server shows something else"
    rm out
    stop_server
}
play() { # play IMAGE [start_server's options]: a guest, its model, the judge
    local image=$1 trims
    rm -f model
    qemu-img convert -O raw "$image" model
    start_server "${@:2}" "$W/$image"
    # With the filter, what was trimmed in pieces and lies below reads as before until all of the cluster is.
    [ $# = 1 ] || trims=0
    guest --model model --trims "${trims:-3}" --requests 150 --connections 2 --largest 300000 >guest.txt || fail "$image: $(cat guest.txt)"
    compact
    stop_server
    judge "$image" model
}

for version in 0.10 1.1; do
    say "compat $version"
    rm -f ./*.qcow2
    create -o compat=$version base.qcow2 8M
    qemu-io -c 'write -P 1 0 8M' base.qcow2 >/dev/null
    create -o compat=$version -b base.qcow2 -F qcow2 one.qcow2
    play one.qcow2 --reclaim
    create -o compat=$version -b one.qcow2 -F qcow2 two.qcow2 12M
    play two.qcow2 --reclaim
    # What the server left, QEMU commits, rebases and flattens; and the server goes on.
    qemu-img convert -O raw two.qcow2 before
    qemu-img rebase -b base.qcow2 -F qcow2 two.qcow2
    same two.qcow2
    cmp before model || fail "qemu-img rebase sees another disk"
    start_server "$W/one.qcow2"
    "$QLEAN" status "$SOCK" | grep -qx "backing file  *$W/base.qcow2" || fail "qlean status does not say what lies below"
    stop_server
    play two.qcow2
    create -o compat=$version -b two.qcow2 -F qcow2 three.qcow2
    play three.qcow2
    qemu-img convert -O raw three.qcow2 before
    qemu-img commit -q three.qcow2 # empties it
    same three.qcow2
    cmp before model || fail "qemu-img commit made another disk"
    same two.qcow2
    cmp before model || fail "qemu-img commit made another disk below"
    play three.qcow2 --reclaim
    qemu-img rebase -b '' three.qcow2
    same three.qcow2
    play three.qcow2
    qemu-img rebase -u -b one.qcow2 -F qcow2 three.qcow2
    same three.qcow2 -r
done

create -b base.qcow2 -F qcow2 top.qcow2
play top.qcow2

# A server that is killed leaves the overlay sound, and nothing older than the last flush.
rm -f model
qemu-img convert -O raw top.qcow2 model
start_server "$W/top.qcow2"
nbdsh_do "$URI" 'h.pwrite(b"x" * 100000, 1000000); h.trim(1 << 20, 4 << 20); h.zero(1 << 20, 5 << 20); h.flush()'
nbdcopy "$URI" model
nbdsh_do "$URI" 'h.trim(1 << 20, 6 << 20)'
kill_server
judge_killed top.qcow2
start_server "$W/top.qcow2"
nbdcopy "$URI" out
cmp -n $((6 << 20)) model out || fail "a flushed byte was lost"
compact
stop_server
judge top.qcow2 out

# A raw disk on a block device.
if [ "$(id -u)" = 0 ] && qemu-img convert -O raw base.qcow2 base.raw && loop=$(losetup -r -f --show base.raw 2>/dev/null); then
    on_exit losetup -d "$loop"
    create -b "$loop" -F raw top.qcow2
    play top.qcow2
    create -b "host_device:$loop" -F host_device top.qcow2
    play top.qcow2
    for name in "file:$loop" "json:{\"driver\":\"raw\",\"file\":{\"driver\":\"file\",\"filename\":\"$loop\"}}"; do
        create -u -b "$name" -F raw top.qcow2 8M
        expect_failure "qemu-io, a device as a file" qemu-io -c 'read 0 512' top.qcow2
        expect_failure "a device as a file" nbdkit -U - "$PLUGIN" file="$W/top.qcow2" --run true
    done
    create -u -b base.raw -F host_device top.qcow2 8M
    expect_failure "qemu-io, a file as a device" qemu-io -c 'read 0 512' top.qcow2
    expect_failure "a file as a device" nbdkit -U - "$PLUGIN" file="$W/top.qcow2" --run true
else
    say "no loop devices: a block device below is not tested"
fi
