#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# An abort, which is what nbdkit 1.32 does when a client dies at the wrong moment: the image is clean and holds every
# write that was acknowledged, flushed or not; the process says that it ended badly (status 134).
. "$(dirname "$0")/../lib.sh"

image=$W/disk.qcow2
create "$image" 256M
start_server "$image"
guest --model "$W/model" --seconds 1 --trims 0
nbdsh_beside "$URI" "
import time
h.pwrite(b'acknowledged' * 1000, 123)
open('$W/idle', 'w').close()
time.sleep(60)"
eventually 10 test -e "$W/idle" || fail "the client did not start"
printf 'acknowledged%.0s' $(seq 1000) | dd of="$W/model" bs=1 seek=123 conv=notrunc status=none
kill -ABRT "$SERVER"
gone "$SERVER" || fail "the server still runs 10 s after SIGABRT"
rc=0
wait "$SERVER" || rc=$?
[ $rc = 134 ] || fail "the server ended with status $rc after SIGABRT"
end_pid "$PID"
judge "$image" "$W/model"
