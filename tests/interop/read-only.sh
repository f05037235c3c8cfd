#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# Started with -r the server reads, and writes nothing: neither the guest nor maintenance can change the image.
. "$(dirname "$0")/../lib.sh"
random_file "$W/data" 4M
create "$W/disk.qcow2" 64M
qemu-io -c "write -s $W/data 0 4M" -c "write -s $W/data 8M 4M" -c 'discard 0 4M' "$W/disk.qcow2" >/dev/null
qemu-img convert -f qcow2 -O raw "$W/disk.qcow2" "$W/model"
before=$(sha "$W/disk.qcow2")
start_server --reclaim "$W/disk.qcow2" -r
nbdcopy "$URI" "$W/out"
cmp "$W/model" "$W/out"
nbdsh_do "$URI" 'assert h.is_read_only()'
for export in compact zeroes; do
    nbdsh_do "$(export_uri $export)" 'assert h.is_read_only() and not h.can_cache()'
done
status .server.read_only | grep -qx true || fail "status does not say that the server is read-only"
expect_failure "qemu-io writing" qemu-io -f raw -c 'write 0 64k' "$URI"
expect_failure "qlean compact of a read-only server" "$QLEAN" compact "$SOCK"
stop_server
[ "$(sha "$W/disk.qcow2")" = "$before" ] || fail "a read-only server changed the image"
judge "$W/disk.qcow2" "$W/model"
