#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# An image on XFS, whose files may share blocks: a move there writes nothing but metadata. Beside a guest that writes to
# what was just moved, after a kill, with a snapshot, and after a mount that has forgotten the page cache.
. "$(dirname "$0")/../lib.sh"
need_root
need losetup mkfs.xfs
[ -e /dev/loop-control ] || skip "no loop devices"
truncate -s 2G "$W/host"
loop=$(losetup -f --show "$W/host") || skip "no free loop device"
on_exit losetup -d "$loop"
on_exit umount -l "$W/mnt"
mkfs.xfs -q -m reflink=1 "$loop"
mkdir "$W/mnt"
mount -t xfs "$loop" "$W/mnt"
image=$W/mnt/disk.qcow2
clusters=2048 # of 64 KiB
create "$image" $((clusters / 16))M
fill() { # fill SEED: every cluster in random order, then half of them trimmed
    nbdsh_do "$URI" "
import random
r = random.Random($1)
order = list(range($clusters)); r.shuffle(order)
noise = r.randbytes(65536 + 4096)
for n in order: h.pwrite(noise[n:n + 65536], n << 16)
for n in order[::2]: h.trim(65536, n << 16)
h.flush()
"
}
written() { awk '$1 == "wchar:" { print $2 }' "/proc/$SERVER/io"; }
# moves_by_sharing: `compact` writes less than a tenth of what it moves
moves_by_sharing() {
    local before moved
    before=$(written)
    compact
    moved=$(status .compact.moved_bytes)
    say "moved $moved bytes, wrote $(($(written) - before))"
    [ "$moved" -ge $((clusters * 65536 / 8)) ] || fail "only $moved bytes moved"
    [ $((($(written) - before) * 10)) -le "$moved" ] || fail "$(($(written) - before)) bytes written for $moved moved"
}

start_server "$image"
fill 1
nbdcopy "$URI" "$W/model"
moves_by_sharing
nbdcopy "$URI" "$W/now"
cmp "$W/now" "$W/model" || fail "the disk has changed"
lean "$image" 101

# A guest beside it, who writes where blocks are shared just now.
fill 2
nbdcopy "$URI" "$W/model"
guest_beside --model "$W/model" --connections 2 --largest 200000
compact
compact
guest_end
stop_server
judge "$image" "$W/model"

# Killed on the way; from the device, not from the page cache.
start_server "$image"
fill 3
nbdcopy "$URI" "$W/model"
"$QLEAN" compact --fast "$SOCK" >>"$W/qlean.log" 2>&1 &
client=$!
has_moved() { [ "$(status .compact.moved_bytes)" -gt 4000000 ]; }
eventually 20 has_moved || fail "nothing moves"
kill_server
wait $client || true
umount "$W/mnt"
mount -t xfs "$loop" "$W/mnt"
judge_killed "$image"
start_server "$image"
compact
lean "$image" 101

# Clusters that a snapshot has as well.
stop_server
qemu-img snapshot -c kept "$image"
cp "$W/model" "$W/kept"
start_server "$image"
fill 4
nbdcopy "$URI" "$W/model"
moves_by_sharing
stop_server
judge "$image" "$W/model"
qemu-img convert -f qcow2 -O raw -l snapshot.name=kept "$image" "$W/now"
cmp "$W/now" "$W/kept" || fail "the snapshot is not what it was"
