#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# What cannot be served is refused before nbdkit serves: one clear sentence, non-zero exit, image untouched.
. "$(dirname "$0")/../lib.sh"
need qemu-img qemu-io
cases=0
good=$W/good.qcow2
create "$good" 64M
qemu-io -c 'write -P 1 0 8M' "$good" >/dev/null

# refuse WHAT PATTERN [NBDKIT ARGUMENTS]: fails with one line that matches the pattern and names the file or option
refuse() {
    local what=$1 pattern=$2 before='' rc=0
    shift 2
    [ ! -f "$image" ] || before=$(sha "$image")
    timeout 20 "${as[@]}" nbdkit -U - "$PLUGIN" "$@" --run true >"$W/out.txt" 2>"$W/err.txt" || rc=$?
    [ $rc != 0 ] || fail "$what: served"
    [ $rc -lt 124 ] || fail "$what: hung or crashed, status $rc: $(cat "$W/err.txt")"
    [ "$(wc -l <"$W/err.txt")" = 1 ] || fail "$what: not one line but: $(cat "$W/err.txt")"
    grep -Eqi -- "$pattern" "$W/err.txt" || fail "$what: the sentence lacks '$pattern': $(cat "$W/err.txt")"
    [ -z "$before" ] || [ "$(sha "$image")" = "$before" ] || fail "$what: the image was changed"
    cases=$((cases + 1))
    echo "  $what: $(sed 's/^nbdkit: error: //' "$W/err.txt")"
}

# broken NAME: a copy of the good image to break
broken() { image=$W/$1.qcow2; cp "$good" "$image"; }
poke() { printf %b "$2" | dd of="$image" bs=1 seek="$1" conv=notrunc status=none; } # OFFSET BYTES
as=()

image=$W/no-such.qcow2
refuse "missing file" 'no-such.qcow2.*(no such|not exist|not found)' file="$image"
image=$W
refuse "a directory" "$W" file="$image"
image=$W/empty
: >"$image"
refuse "empty file" 'empty' file="$image"
image=$W/raw
random_file "$image" 1M
refuse "not QCOW2" 'raw.*(not.*qcow2|magic)' file="$image"
broken short
truncate -s 40 "$image"
refuse "cut inside the header" 'short.*(truncated|short|header|not)' file="$image"
broken cut
truncate -s 65536 "$image"
refuse "cut before the L1 table" 'cut.qcow2.*(truncated|end|beyond|L1|refcount)' file="$image"
broken version
poke 7 '\x09'
refuse "version 9" 'version 9' file="$image"
broken clusters
poke 23 '\x07'
refuse "clusters of 128 bytes" 'cluster' file="$image"
broken l1
poke 36 '\xff\xff'
refuse "L1 table larger than any" 'L1' file="$image"
broken table
poke 40 '\x00\x00\x00\x00\x00\x00\x00\x07'
refuse "L1 table at an odd offset" 'L1' file="$image"
broken corrupt
poke 79 '\x02'
refuse "corrupt bit" 'corrupt' file="$image"
broken unknown
poke 74 '\x01'
refuse "unknown incompatible feature" '(unknown|incompatible).*feature|feature.*unknown|bit 40' file="$image"

image=$good
refuse "unknown option" 'colour' file="$image" colour=green
refuse "no file given" 'file'
start_server "$image"
before=$(sha "$good")
refuse "locked by a second server" 'in use by another process' file="$image"
expect_failure "an unknown export" nbdinfo "$(export_uri no-such-export)"
grep -q 'no-such-export' "$W"/server*.log || fail "the log does not name the unknown export"
nbdsh_do "$URI" 'assert h.pread(512, 0) == b"\1" * 512' # the server lives on
stop_server
[ "$(sha "$good")" = "$before" ] || fail "the image was changed by clients that only read"

run_pid "$W/qemu-nbd.log" qemu-nbd -t -k "$W/q" -f qcow2 "$good"
eventually 10 test -S "$W/q"
refuse "locked by qemu-nbd" 'in use by another process' file="$image"
end_pid "$PID"
wait "$PID" || true

broken protected
chmod 444 "$image"
chmod 755 "$W"
[ "$(id -u)" != 0 ] || as=(setpriv --reuid=65534 --regid=65534 --clear-groups)
refuse "read-only file" 'permission|read-only' file="$image"
timeout 20 "${as[@]}" nbdkit -r -U - "$PLUGIN" file="$image" --run 'nbdinfo --size "$uri"' >"$W/size.txt" ||
    fail "a read-only file is not served with -r"
grep -qx $((64 * 1024 * 1024)) "$W/size.txt" || fail "wrong size: $(cat "$W/size.txt")"
say "$cases cases"
