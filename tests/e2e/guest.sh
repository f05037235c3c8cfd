#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# A Linux guest in a libvirt domain on the plugin: it writes, deletes and trims by itself and through `virsh domfstrim`,
# and hashes what it writes while `qlean compact` runs beside it. Every hash holds, in a second boot too, and the image
# ends at most 1.02 x as long as what `qemu-img convert` makes of it.
. "$(dirname "$0")/../lib.sh"
need_root
. "$TESTS/e2e/guest/lib.sh"
. "$TESTS/e2e/guest/libvirt.sh"
image=$W/disk.qcow2
mib=$((1024 * 1024))
create "$image" 1G
start_server --reclaim "$image"

pack_job <<'END'
mkfs.ext4 -q -F /dev/vda && mount -t ext4 /dev/vda /mnt || tell FAIL mount
for i in 1 2 3 4 5 6 7 8 9 10 11 12; do dd if=/dev/urandom of=/mnt/f$i bs=1M count=8 2>/dev/null || tell FAIL f$i; done
sync
(cd /mnt && sha256sum f1 f4 f8 f12) >/run/sums
rm /mnt/f2 /mnt/f3 /mnt/f5 /mnt/f6
sync
fstrim /mnt && tell TRIMMED || tell FAIL fstrim
rm /mnt/f7 /mnt/f9 /mnt/f10 # for the host's domfstrim
sync
tell READY
until [ -e /run/go ]; do usleep 100000; done
n=0
until [ -e /run/stop ]; do # writes, deletes and hashes
    f=w$((n % 9))
    rm -f /mnt/w$(((n + 5) % 9)) /run/sum.w$(((n + 5) % 9))
    dd if=/dev/urandom of=/mnt/$f bs=64k count=$((1 + n * 7 % 40)) 2>/dev/null || tell FAIL write $f
    (cd /mnt && sha256sum $f) >/run/sum.$f
    [ $((n % 3)) != 0 ] || sync
    [ $((n % 8)) != 7 ] || echo 3 >/proc/sys/vm/drop_caches
    (cd /mnt && cat /run/sums /run/sum.* | sha256sum -c -s) || tell FAIL hash
    n=$((n + 1))
    tell HASHED $n
done
cat /run/sums /run/sum.* >/mnt/sums
sync
echo 3 >/proc/sys/vm/drop_caches
(cd /mnt && sha256sum -c -s sums) && tell VERIFIED $(wc -l </mnt/sums) || tell FAIL verify
END
start_domain first
guest_says 90 READY
say "the guest wrote, deleted and trimmed"

before=$(allocated "$image")
agent_trims() { v_try domfstrim first; }
eventually 30 agent_trims || fail "virsh domfstrim: $V"
given_back() { [ $((before - $(allocated "$image"))) -ge $((20 * mib)) ]; }
eventually 15 given_back || fail "domfstrim gave back $((before - $(allocated "$image"))) bytes of 24 MiB deleted"
say "virsh domfstrim: $before -> $(allocated "$image") bytes allocated"

hashed() { grep -ac '^GUEST HASHED' "$W/serial.txt" || true; }
in_guest first 'touch /run/go'
guest_says 30 'HASHED 3'
long=$(length "$image")
from=$(hashed)
more() { [ "$(hashed)" -gt "$1" ]; }
compact_kindly
eventually 30 more "$from" || fail "the guest does not go on beside compaction"
for _ in 1 2; do # again and again, while it goes on writing
    at=$(hashed)
    eventually 30 more $((at + 2)) || fail "the guest does not go on"
    compact_kindly
done
guest_said FAIL && fail "$(grep -a '^GUEST FAIL' "$W/serial.txt" | head -n 3)"
say "compacted three times beside the guest, length $long -> $(length "$image"), $(($(hashed) - from)) rounds hashed meanwhile"
[ "$(length "$image")" -lt "$long" ] || fail "compaction beside the guest gained nothing"

in_guest first 'touch /run/stop'
guest_says 60 VERIFIED
in_guest first 'fstrim /mnt' || fail "fstrim through the agent failed"
compact_kindly
v shutdown first --mode agent >/dev/null
end_of_domain first
stop_server
judge "$image"
lean "$image" 102

start_server --reclaim "$image"
pack_job <<'END'
mount -t ext4 -o ro /dev/vda /mnt || tell FAIL mount
(cd /mnt && sha256sum -c -s sums) && tell VERIFIED $(wc -l </mnt/sums) || tell FAIL verify
umount /mnt
poweroff -f
END
start_domain second
guest_says 60 VERIFIED
end_of_domain second
stop_server
judge "$image"
say "second boot: $(grep -a VERIFIED "$W/serial.txt" | tr -d '\r') files"
