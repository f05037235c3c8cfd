#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# Usage: filesystems.sh ext4|xfs|btrfs. A real file system of the host's kernel on the disk (nbdfuse and a loop device, no
# VM): written, deleted, trimmed, and compacted while files are written; what was written is there after a remount.
. "$(dirname "$0")/../lib.sh"
need_root
fs=${1:?ext4, xfs or btrfs}
need nbdfuse losetup fstrim "mkfs.$fs"
[ -e /dev/fuse ] || skip "no /dev/fuse"
[ -e /dev/loop-control ] || skip "no loop devices"
image=$W/disk.qcow2
mib=$((1024 * 1024))
size=$((1024 * mib))
create "$image" $size
start_server --reclaim "$image"

mkdir "$W/fuse" "$W/mnt"
run_pid "$W/nbdfuse.log" nbdfuse "$W/fuse/" "$URI"
on_exit umount -l "$W/fuse"
mounted() { [ "$(stat -c %s "$W/fuse/nbd" 2>/dev/null)" = $size ]; }
eventually 10 mounted || fail "nbdfuse does not show the disk: $(cat "$W/nbdfuse.log")"
loop=$(losetup -f --show "$W/fuse/nbd") || skip "no free loop device"
on_exit losetup -d "$loop"
on_exit umount -l "$W/mnt"

"mkfs.$fs" -q "$loop" >/dev/null
mount -t "$fs" "$loop" "$W/mnt"
write() { dd if=/dev/urandom of="$W/mnt/$1" bs=64k count="$2" status=none; }
for i in $(seq 40); do write "f$i" $((i * 3 + 5)); done
mkdir "$W/mnt/small"
for i in $(seq 200); do write "small/$i" 1; done
sync -f "$W/mnt"
full=$(allocated "$image")
for i in $(seq 40); do [ $((i % 3)) = 0 ] || rm "$W/mnt/f$i"; done
rm "$W"/mnt/small/*[13579]
(cd "$W/mnt" && find . -type f -exec sha256sum {} +) >"$W/sums"
sync -f "$W/mnt" # what is freed in an open transaction is not trimmed
fstrim "$W/mnt"
given_back() { [ $((full - $(allocated "$image"))) -ge $((80 * mib)) ]; }
eventually 15 given_back || fail "fstrim gave back $((full - $(allocated "$image"))) bytes of 111 MiB deleted"
say "fstrim: $full -> $(allocated "$image") bytes allocated"
long=$(length "$image")

writer() { # until $W/stop: files written, written over, deleted and hashed
    local n=0
    until [ -e "$W/stop" ]; do
        write "w$((n % 7))" $((1 + n * 5 % 31))
        [ $((n % 4)) != 3 ] || sync -f "$W/mnt"
        [ $((n % 9)) != 8 ] || rm "$W/mnt/w$((n % 5))"
        n=$((n + 1))
        echo $n >"$W/rounds"
    done
    (cd "$W/mnt" && sha256sum w*) >>"$W/sums"
}
writer &
writer=$!
PIDS+=("$writer")
rounds() { # the writer may be rewriting the file just now
    local n
    until n=$(cat "$W/rounds" 2>/dev/null) && [ -n "$n" ]; do sleep 0.01; done
    echo "$n"
}
started() { [ "$(rounds)" -ge 5 ]; }
eventually 20 started || fail "the writer does not write"
from=$(rounds)
compact_kindly
compact_kindly
kill -0 $writer 2>/dev/null || fail "the writer failed beside compaction"
[ "$(rounds)" -gt "$from" ] || fail "nothing was written during compaction"
touch "$W/stop"
wait $writer || fail "the writer failed"
say "compacted beside $(($(rounds) - from)) rounds of the writer, length $long -> $(length "$image")"

umount "$W/mnt"
blockdev --flushbufs "$loop"
mount -t "$fs" "$loop" "$W/mnt"
(cd "$W/mnt" && sha256sum --quiet -c "$W/sums") || fail "files differ after compaction and remount"
fstrim "$W/mnt"
umount "$W/mnt"
losetup -d "$loop"
compact_kindly
nbdcopy "$URI" "$W/raw"
stop_server
judge "$image" "$W/raw"
lean "$image" 102

loop=$(losetup -f --show -r "$W/raw") # the judge of the file system itself
on_exit losetup -d "$loop"
case $fs in
ext4) e2fsck -fn "$loop" ;;
xfs) xfs_repair -n "$loop" ;;
btrfs) btrfs check "$loop" ;;
esac >"$W/fsck.log" 2>&1 || fail "the file system is damaged: $(head -n 20 "$W/fsck.log")"
