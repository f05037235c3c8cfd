#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# What cannot be served is refused before nbdkit serves: one clear sentence, non-zero exit, image untouched.
. "$(dirname "$0")/../lib.sh"
need qemu-img qemu-io
good=$W/good.qcow2
create "$good" 64M
qemu-io -c 'write -P 1 0 8M' "$good" >/dev/null

# broken NAME: a copy of the good image to break
broken() { image=$W/$1.qcow2; cp "$good" "$image"; }
poke() { printf %b "$2" | dd of="$image" bs=1 seek="$1" conv=notrunc status=none; } # OFFSET BYTES

image=$W/no-such.qcow2
refused "$image" 'no-such.qcow2.*(no such|not exist|not found)'
image=$W
refused "$image" "$W"
image=$W/empty
: >"$image"
refused "$image" 'empty'
image=$W/raw
random_file "$image" 1M
refused "$image" 'raw.*(not.*qcow2|magic)'
broken short
truncate -s 40 "$image"
refused "$image" 'short.*(truncated|short|header|not)'
broken cut
truncate -s 65536 "$image"
refused "$image" 'cut.qcow2.*(truncated|end|beyond|L1|refcount)'
broken version
poke 7 '\x09'
refused "$image" 'version 9'
broken clusters
poke 23 '\x07'
refused "$image" 'cluster'
broken l1
poke 36 '\xff\xff'
refused "$image" 'L1'
broken table
poke 40 '\x00\x00\x00\x00\x00\x00\x00\x07'
refused "$image" 'L1'
broken corrupt
poke 79 '\x02'
refused "$image" 'corrupt'
broken unknown
poke 74 '\x01'
refused "$image" '(unknown|incompatible).*feature|feature.*unknown|bit 40'

image=$good
refused "$image" 'colour' colour=green
expect_failure "no file given" nbdkit -U - "$PLUGIN" --run true
grep -q file "$W/failed.txt" || fail "no file given: $(cat "$W/failed.txt")"
start_server "$image"
before=$(sha "$good")
refused "$image" 'in use by another process'
expect_failure "an unknown export" nbdinfo "$(export_uri no-such-export)"
grep -q 'no-such-export' "$W"/server*.log || fail "the log does not name the unknown export"
nbdsh_do "$URI" 'assert h.pread(512, 0) == b"\1" * 512' # the server lives on
stop_server
[ "$(sha "$good")" = "$before" ] || fail "the image was changed by clients that only read"

run_pid "$W/qemu-nbd.log" qemu-nbd -t -k "$W/q" -f qcow2 "$good"
eventually 10 test -S "$W/q"
refused "$image" 'in use by another process'
end_pid "$PID"
wait "$PID" || true

broken protected
chmod 444 "$image"
chmod 755 "$W"
as=()
[ "$(id -u)" != 0 ] || as=(setpriv --reuid=65534 --regid=65534 --clear-groups)
expect_failure "a file that may not be written" "${as[@]}" nbdkit -U - "$PLUGIN" file="$image" --run true
grep -Eqi 'permission|read-only' "$W/failed.txt" || fail "a read-only file: $(cat "$W/failed.txt")"
timeout 20 "${as[@]}" nbdkit -r -U - "$PLUGIN" file="$image" --run 'nbdinfo --size "$uri"' >"$W/size.txt" ||
    fail "a read-only file is not served with -r"
grep -qx $((64 * 1024 * 1024)) "$W/size.txt" || fail "wrong size: $(cat "$W/size.txt")"
