#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# What the reclaim filter gives back are no requests of the guest's: they are not counted as such, and `qlean compact`,
# which goes slowly beside a guest, does not take itself for one. Through the filter nobody else comes that way.
. "$(dirname "$0")/../lib.sh"

create "$W/disk.qcow2" 1G
start_server --reclaim "$W/disk.qcow2"
"$PYTHON" - "$URI" <<'END'
import nbd, sys
h = nbd.NBD()
h.connect_uri(sys.argv[1])
data, zeroes = bytes(range(256)) * 4096, bytes(1 << 20)
for payload in (data, zeroes): # the filter records the zeroes
    for at in range(0, 512 << 20, 1 << 20):
        h.pwrite(payload, at)
h.flush()
END
truncate -s 1G "$W/model"
to_do=$("$QLEAN" plan --json "$SOCK" reclaim | jq '.exports[0].bytes')
[ "$to_do" = $((512 << 20)) ] || fail "recorded: $to_do"
counted() { status '.guest | del(.latency_us)'; }
before=$(counted)
sleep 2.2 # the page tells of the last second or two
"$QLEAN" compact --json "$SOCK" >"$W/compact.json"
[ "$(jq -r '.operations[] | select(.export == "reclaim") | .handled_bytes' "$W/compact.json")" = "$to_do" ] || fail "$(cat "$W/compact.json")"
seconds=$(jq -r '.operations[] | select(.export == "reclaim") | .elapsed_seconds' "$W/compact.json")
say "reclaim took $seconds s"
# At the pace that it has beside a guest it would be at 4 or 8 MiB/s, a minute or more.
jq -e '.operations[] | select(.export == "reclaim") | .elapsed_seconds < 20' "$W/compact.json" >/dev/null || fail "reclaim took $seconds s, with nobody else there"
[ "$(counted)" = "$before" ] || fail "counted as the guest's: $before became $(counted)"
! nbdinfo --no-content "$(export_uri reclaim/disk)" >"$W/opened.txt" 2>&1 || fail "the disk was opened past the filter"
stop_server
judge "$W/disk.qcow2" "$W/model"
