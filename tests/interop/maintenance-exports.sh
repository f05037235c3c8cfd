#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# Tools that copy disks, and QEMU, pointed at a maintenance export fail with an error and change nothing: a plan is
# no disk, and a backup of an empty plan must not succeed as a disk full of zeroes.
. "$(dirname "$0")/../lib.sh"
need qemu-img qemu-system-x86_64 nbdcopy nbdinfo

random_file "$W/data" 8M
create "$W/empty-plan.qcow2" 64M
create "$W/work-to-do.qcow2" 64M
qemu-io -c "write -s $W/data 0 8M" -c "write -s $W/data 16M 8M" -c "discard 0 8M" "$W/work-to-do.qcow2" >/dev/null

# server_lives IMAGE: nbdkit before 1.34 may abort when a client exits with requests in flight, as nbdcopy does after an
# error; then, and only then, the server is started again
server_lives() {
    ! kill -0 "$SERVER" 2>/dev/null || return 0
    grep -q 'raw_send_socket: Assertion' "$W/server$SERVERS.log" || fail "the server died"
    say "nbdkit aborted when a client left, which it does before 1.34: $(nbdkit --version)"
    start_server --reclaim "$1"
}

try_export() { # EXPORT: each tool that would take it for a disk
    local uri
    server_lives "$W/$image.qcow2"
    uri=$(export_uri "$1")
    expect_failure "qemu-img convert into $1" qemu-img convert -n -f raw -O raw "$W/data" "$uri"
    expect_failure "nbdcopy into $1" nbdcopy "$W/data" "$uri"
    expect_failure "qemu-io writing to $1" qemu-io -f raw -c "write 0 64k" "$uri"
    expect_failure "a VM with $1 as its disk" qemu-system-x86_64 -accel tcg -display none -nodefaults -S \
        -blockdev "driver=nbd,node-name=d,export=$1,server.type=unix,server.path=$SOCK" -device virtio-blk-pci,drive=d
    [ "$1" != status ] || return 0 # reading status is what it is for
    expect_failure "qemu-img convert from $1" qemu-img convert -f raw -O raw "$uri" "$W/copy"
    expect_failure "qemu-img convert from $1 to qcow2" qemu-img convert -f raw -O qcow2 "$uri" "$W/copy"
    expect_failure "nbdcopy from $1" nbdcopy "$uri" "$W/copy"
    sleep 0.1
    server_lives "$W/$image.qcow2"
    uri=$(export_uri "$1")
    expect_failure "nbdcopy from $1 without extents" nbdcopy --allocated --request-size=65536 "$uri" "$W/copy"
    rm -f "$W/copy"
    sleep 0.1 # a client's death reaches the server
    server_lives "$W/$image.qcow2"
}

for image in empty-plan work-to-do; do
    before=$(sha "$W/$image.qcow2")
    start_server --reclaim "$W/$image.qcow2"
    nbdinfo --list "nbd+unix://?socket=$SOCK" >"$W/list.txt"
    for export in compact zeroes status reclaim; do
        grep -q "export=\"$export\"" "$W/list.txt" || fail "no export $export in the server's list"
        try_export "$export"
    done
    status .qlean | grep -qx 1 || fail "status is not JSON of schema 1"
    stop_server
    [ "$(sha "$W/$image.qcow2")" = "$before" ] || fail "$image.qcow2 was changed through a maintenance export"
    judge "$W/$image.qcow2"
    say "$image: refused everywhere, unchanged"
done
