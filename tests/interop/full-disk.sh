#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# A full disk: the guest gets ENOSPC and nothing else breaks; trimming makes room again; `qlean compact` stops with one
# clear sentence where not one byte is free, and does all of its work where one megabyte is.
. "$(dirname "$0")/../lib.sh"
need_root
mkdir "$W/small"
mount -t tmpfs -o size=48m tmpfs "$W/small" 2>"$W/mount.log" || skip "cannot mount a tmpfs"
on_exit umount -l "$W/small"
image=$W/small/disk.qcow2
create "$image" 128M
start_server --reclaim "$image"

nbdsh_do "$URI" "
import errno, random
order = list(range(2048)); random.Random(4).shuffle(order)
block = lambda n: random.Random(n).randbytes(65536)
done = []
for n in order:
    try:
        h.pwrite(block(n), n << 16)
    except nbd.Error as error:
        assert error.errnum == errno.ENOSPC, error
        break
    done.append(n)
else:
    raise SystemExit('128 MiB went into 48 MiB')
assert len(done) > 500, len(done)
try: h.flush()
except nbd.Error as error: assert error.errnum == errno.ENOSPC, error
for n in done: assert h.pread(65536, n << 16) == block(n), n
for n in done[::2]: h.trim(65536, n << 16)
h.flush()
for n in done[::2]: assert h.pread(65536, n << 16) == bytes(65536), n
for n in done[1::2]: assert h.pread(65536, n << 16) == block(n), n
h.pwrite(block(done[0]), done[0] << 16)  # there is room again
h.flush()
"
given_back() { [ "$(allocated "$image")" -lt $((27 * 1024 * 1024)) ]; }
eventually 15 given_back || fail "trimmed clusters still take space: $(allocated "$image") bytes allocated"
for block in 64k 4k; do # until not one block is free
    dd if=/dev/zero of="$W/small/filler" bs=$block oflag=append conv=notrunc status=none 2>/dev/null || true
done
[ "$(($(df --output=avail "$W/small" | tail -n 1)))" = 0 ] || fail "the file system is not full"
before=$(length "$image")
nbdcopy "$URI" "$W/raw"

# Not one free byte: a move has nowhere to go, which is said in one sentence, and the guest is served on.
if "$QLEAN" compact "$SOCK" >"$W/full.log" 2>&1; then
    [ "$(length "$image")" -lt "$before" ] || fail "compaction on a full disk claims success and gained nothing"
else
    grep -q 'No space left' "$W/full.log" || fail "compaction on a full disk: $(tail -n 3 "$W/full.log")"
fi
nbdcopy "$URI" "$W/raw2"
cmp "$W/raw" "$W/raw2" || fail "the guest's disk changed on a full disk"

# One free megabyte is enough for all of it.
truncate -s -1M "$W/small/filler"
compact
[ "$(length "$image")" -lt "$before" ] || fail "compaction with 1 MiB free gained nothing: $before bytes"
say "with 1 MiB free: $before -> $(length "$image") bytes"
stop_server
judge "$image" "$W/raw"
lean "$image" 102
