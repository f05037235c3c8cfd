#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# A full disk: the guest gets ENOSPC and nothing else breaks; trimming makes room again, and `qlean compact` works on a
# file system without one free byte, because it needs none.
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
given_back() { [ "$(allocated "$image")" -lt $((30 * 1024 * 1024)) ]; }
eventually 15 given_back || fail "trimmed clusters still take space: $(allocated "$image") bytes allocated"
for block in 64k 4k; do # until not one block is free
    dd if=/dev/zero of="$W/small/filler" bs=$block oflag=append conv=notrunc status=none 2>/dev/null || true
done
[ "$(df --output=avail "$W/small" | tail -n 1)" = 0 ] || fail "the file system is not full"
before=$(length "$image")
nbdcopy "$URI" "$W/raw"
compact
[ "$(length "$image")" -lt "$before" ] || fail "compaction on a full disk gained nothing: $before bytes"
say "on a full disk: $before -> $(length "$image") bytes"
stop_server
judge "$image" "$W/raw"
lean "$image" 102
