#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# A feature of QCOW2 that is not supported yet is refused at open, by its name, and the image stays as it is.
. "$(dirname "$0")/../lib.sh"
need qemu-img qemu-io

# refused NAME PATTERN: $W/NAME.qcow2 is not served, and one sentence says which feature is the reason
refused() {
    local image=$W/$1.qcow2 before rc=0
    before=$(sha "$image")
    timeout 20 nbdkit -U - "$PLUGIN" file="$image" --run true >"$W/out.txt" 2>"$W/err.txt" || rc=$?
    { [ $rc != 0 ] && [ $rc -lt 124 ]; } || fail "$1: status $rc: $(cat "$W/err.txt")"
    [ "$(wc -l <"$W/err.txt")" = 1 ] || fail "$1: not one line but: $(cat "$W/err.txt")"
    grep -Eqi -- "$2" "$W/err.txt" || fail "$1: the sentence does not name $2: $(cat "$W/err.txt")"
    [ "$(sha "$image")" = "$before" ] || fail "$1: the image was changed"
    echo "  $1: $(sed 's/^nbdkit: error: //' "$W/err.txt")"
}

create -o compression_type=zstd "$W/compression.qcow2" 16M
printf '\x02' | dd of="$W/compression.qcow2" bs=1 seek=104 conv=notrunc status=none
refused compression 'compression type 2'
