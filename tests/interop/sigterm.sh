#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# SIGTERM with clients connected, one idle and one writing: the server ends by itself with status 0, and the image is
# clean and holds every write that was acknowledged, flushed or not.
. "$(dirname "$0")/../lib.sh"

cat >"$W/client.py" <<'END'
import nbd
data = bytes(range(1, 256)) * 257
acked = 0
open("MARK", "w").close()
try:
    while True:
        h.pwrite(data, acked * 65792 % (h.get_size() - 65792))
        acked += 1
        open("MARK", "w").write(str(acked))
except nbd.Error as error:
    print("refused after", acked, error)
END
for mode in '' --reclaim; do
    rm -f "$W/busy" "$W/model"
    image=$W/disk$mode.qcow2
    create "$image" 256M
    # shellcheck disable=SC2086
    start_server $mode "$image"
    # unflushed writes of a client that stays connected
    guest --model "$W/model" --seconds 1 --trims 0
    nbdsh_beside "$URI" "
import time
h.pwrite(b'acknowledged' * 1000, 123)
open('$W/idle', 'w').close()
time.sleep(60)"
    eventually 10 test -e "$W/idle" || fail "the idle client did not start"
    printf 'acknowledged%.0s' $(seq 1000) | dd of="$W/model" bs=1 seek=123 conv=notrunc status=none
    stop_server
    kill -0 "$PID" || fail "the idle client was gone before the server: nothing was tested"
    end_pid "$PID"
    rm "$W/idle"
    judge "$image" "$W/model"

    # shellcheck disable=SC2086
    start_server $mode "$image"
    sed "s|MARK|$W/busy|" "$W/client.py" >"$W/busy.py"
    nbdsh_beside "$URI" "$(cat "$W/busy.py")"
    eventually 10 test -s "$W/busy" || fail "the writing client did not start"
    stop_server
    wait "$PID" || true
    judge "$image"
    acked=$(cat "$W/busy")
    [ "$acked" -gt 0 ]
    qemu-img convert -f qcow2 -O raw "$image" "$W/raw"
    "$PYTHON" - "$W/raw" "$acked" <<'END'
import sys
raw, acked = open(sys.argv[1], "rb"), int(sys.argv[2])
size = 256 << 20
for n in range(max(0, acked - 1000), acked):  # the last ones: earlier ones may have been written over
    raw.seek(n * 65792 % (size - 65792))
    if n == acked - 1 or acked < 3000:
        assert raw.read(65535) == bytes(range(1, 256)) * 257, f"acknowledged write {n} of {acked} is missing"
END
    say "$acked writes acknowledged before SIGTERM are there"
done
