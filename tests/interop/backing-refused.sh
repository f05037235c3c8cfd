#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# What lies below an image and cannot be read is refused with one sentence that names it: missing files, chains that never
# end, other protocols and formats, QEMU writing below. QEMU's locks are taken on what lies below, shared.
. "$(dirname "$0")/../lib.sh"
need qemu-img qemu-io qemu-nbd

served() { timeout 20 nbdkit -U - "$PLUGIN" file="$1" --run true >"$W/err.txt" 2>&1 || fail "$1: $(cat "$W/err.txt")"; }
over() { create -u -b "$2" -F "${3:-qcow2}" "$1" 16M; } # over IMAGE BACKING [FORMAT]

cd "$W"
create base.qcow2 16M
over top.qcow2 missing.qcow2
refused "$W/top.qcow2" "missing.qcow2.*No such file"
over mid.qcow2 gone.qcow2
over top.qcow2 mid.qcow2
refused "$W/top.qcow2" "top.qcow2.*gone.qcow2.*No such file"
over a.qcow2 b.qcow2
over b.qcow2 c.qcow2
over c.qcow2 a.qcow2
refused "$W/a.qcow2" "never *ends"
over self.qcow2 ./self.qcow2
refused "$W/self.qcow2" "never *ends"
ln -s self2.qcow2 link.qcow2
over self2.qcow2 link.qcow2
refused "$W/self2.qcow2" "never *ends"
for n in $(seq 0 250); do over "deep$n.qcow2" "deep$((n + 1)).qcow2"; done
refused "$W/deep0.qcow2" "more than 200"
cp base.qcow2 deep180.qcow2
served "$W/deep0.qcow2"
rm deep*

over top.qcow2 nbd://localhost/disk raw
refused "$W/top.qcow2" "'nbd'"
over top.qcow2 https://user:hunter2@localhost/disk
refused "$W/top.qcow2" "'https'"
grep -q hunter2 err.txt && fail "a password was shown"
over top.qcow2 'json:{"driver":"raw","file":{"driver":"ssh","host":"localhost","path":"/x"}}' raw
refused "$W/top.qcow2" "'ssh'"
over top.qcow2 'json:{"driver":"qcow2","backing":{"driver":"null-co"},"file":{"driver":"file","filename":"base.qcow2"}}'
refused "$W/top.qcow2" "'backing"
over top.qcow2 'json:{"driver":"raw","offset":512,"size":16777216,"file.filename":"'"$W/base.qcow2"'"}' raw
refused "$W/top.qcow2" "too few"
for format in vmdk vdi vpc vhdx qed qcow parallels; do
    qemu-img create -q -f $format "base.$format" 16M
    over top.qcow2 "base.$format" $format
    refused "$W/top.qcow2" "'$format'"
    # Nobody says which format: no less refused, for QEMU would know it.
    "$PYTHON" - top.qcow2 <<'END'
import sys
with open(sys.argv[1], "r+b") as f:
    head = f.read(512)
    f.seek(0)
    f.write(head.replace(bytes.fromhex("e2792aca"), b"qlea"))
END
    refused "$W/top.qcow2" "looks like format '$format'"
done
over top.qcow2 "$W" raw
refused "$W/top.qcow2" "not a regular file|directory"
mkfifo pipe
over top.qcow2 pipe raw
refused "$W/top.qcow2" "not a regular file"
printf 'not an image' >text
over top.qcow2 text qcow2
refused "$W/top.qcow2" "text.*not a QCOW2"
over mid.qcow2 base.qcow2
printf '\x02' | dd of=mid.qcow2 bs=1 seek=40 conv=notrunc status=none
over top.qcow2 mid.qcow2
refused "$W/top.qcow2" "mid.qcow2.*damaged"

# Locks: what lies below may be read by anybody, and written by nobody.
over top.qcow2 base.qcow2
over other.qcow2 base.qcow2
start_server "$W/top.qcow2"
served "$W/other.qcow2"
qemu-io -f qcow2 -c 'write 0 64k' other.qcow2 >/dev/null
refused "$W/base.qcow2" "in use by another"
qemu-img info base.qcow2 >/dev/null
expect_failure "writing to a base in use" qemu-io -f qcow2 -c 'write 0 64k' base.qcow2
stop_server
qemu-io -f qcow2 -c 'write 0 64k' base.qcow2 >/dev/null
run_pid "$W/qemu-nbd.log" qemu-nbd -t -k "$W/q" -f qcow2 base.qcow2
eventually 10 test -S "$W/q" || fail "qemu-nbd did not start"
refused "$W/top.qcow2" "base.qcow2.*in use by another"
end_pid "$PID"
