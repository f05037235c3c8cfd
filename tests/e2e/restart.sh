#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# Usage: restart.sh TERM|KILL. The server is stopped with this signal and started again, several times, under QEMU with
# reconnect-delay: first under qemu-storage-daemon with a checked writer on it, then under a Linux guest. Neither sees one
# I/O error. After SIGTERM every acknowledged byte is there; after SIGKILL every flushed one.
. "$(dirname "$0")/../lib.sh"
. "$TESTS/e2e/guest/lib.sh"
signal=${1:?TERM or KILL}
need qemu-storage-daemon
image=$W/disk.qcow2
kills=()
[ "$signal" = TERM ] || kills=(--kills "$W/kills")

# restart: the server goes, stays away for a moment, and comes back under the same socket
restart() {
    printf . >>"$W/kills" # before and after: a writer that counts knows when it may have lost what it did not flush
    if [ "$signal" = TERM ]; then stop_server; else kill_server; fi
    sleep 0.$((RANDOM % 9))
    start_server --reclaim --socket "$W/s" "$image"
    printf . >>"$W/kills"
}

nbd="driver=nbd,node-name=disk,reconnect-delay=30,server.type=unix,server.path=$W/s,discard=unmap"

# --- a writer
create "$image" 256M
start_server --reclaim --socket "$W/s" "$image"
: >"$W/kills"
run_pid "$W/daemon.log" qemu-storage-daemon --blockdev "$nbd" \
    --nbd-server "addr.type=unix,addr.path=$W/q" --export type=nbd,id=e,node-name=disk,name=,writable=on
daemon=$PID
eventually 10 test -S "$W/q" || fail "qemu-storage-daemon did not start"
URI="nbd+unix:///?socket=$W/q"
guest_beside --model "$W/model" --largest 65536 --pause 0.002 "${kills[@]}"
for _ in 1 2 3 4 5 6; do
    sleep 1.$((RANDOM % 9)) # QEMU tries to reconnect once a second: the writer has to get something done in between
    restart
    URI="nbd+unix:///?socket=$W/q"
done
sleep 1
guest_end
end_pid "$daemon"
wait "$daemon" || fail "qemu-storage-daemon ended with an error"
compact_kindly
stop_server
judge "$image" "$W/model"
lean "$image" 102
say "six restarts with SIG$signal under a writer"

# --- a guest
if [ "$signal" = TERM ]; then # what is acknowledged stays: a file system and its cache can rely on it
    pack_job <<'END'
mkfs.ext4 -q -F /dev/vda && mount -t ext4 /dev/vda /mnt || tell FAIL mount
head -c 4194304 /dev/urandom >/run/noise
write() { dd if=/run/noise bs=65536 skip=$((n % 60)) count=16 of=/mnt/$((n % 40)) 2>/dev/null && sync; }
confirm() { (cd /mnt && sha256sum $((n % 40))) >/run/sum$((n % 40)); }
verify() { umount /mnt && mount -t ext4 /dev/vda /mnt && (cd /mnt && cat /run/sum* | sha256sum -c -s); }
END
else # QEMU replays what was under way, but not what a killed server had acknowledged and not yet flushed
    pack_job <<'END'
head -c 4194304 /dev/urandom >/run/noise
at() { dd if=/dev/vda bs=65536 iflag=direct skip=$1 count=1 2>/dev/null | sha256sum; }
write() { dd if=/run/noise bs=65536 skip=$((n % 64)) count=1 of=/dev/vda seek=$((n % 500)) oflag=direct conv=fsync,notrunc 2>/dev/null; }
confirm() {
    want=$(dd if=/run/noise bs=65536 skip=$((n % 64)) count=1 2>/dev/null | sha256sum)
    if [ "$(at $((n % 500)))" != "$want" ]; then # lost before its flush: once more, and now it must stay
        write && again=$((again + 1)); [ "$(at $((n % 500)))" = "$want" ]
    fi && echo "$want" >/run/sum$((n % 500))
}
verify() { for f in /run/sum*; do [ "$(at ${f#/run/sum})" = "$(cat $f)" ] || return 1; done; }
END
fi
cat >>"$W/job/job" <<'END'
tell START
n=0 again=0
while [ $n -lt 100000 ] && read -r up _ </proc/uptime && [ ${up%.*} -lt 25 ]; do
    write || tell FAIL write $n
    confirm || tell FAIL confirm $n
    n=$((n + 1))
    tell ROUND $n
done
verify && tell VERIFIED || tell FAIL verify
tell LOST-AND-REPEATED $again
dmesg | grep -i 'i/o error' | while read -r l; do tell FAIL "$l"; done
umount /mnt 2>/dev/null
sync
tell DONE
poweroff -f
END
mv "$W/job/job" "$W/whole"
pack_job <"$W/whole"

rm "$image"
create "$image" 512M
start_server --reclaim --socket "$W/s" "$image"
run_pid "$W/qemu.log" qemu-system-x86_64 -accel tcg -machine q35 -cpu qemu64,+rdrand -m 192 -display none -nodefaults \
    -no-reboot -kernel "$GUEST_DIR/vmlinuz" -initrd "$W/initrd" -append 'console=ttyS0 quiet panic=-1' \
    -serial "file:$W/serial.txt" -blockdev "$nbd" -device virtio-blk-pci,drive=disk,werror=report,rerror=report
qemu=$PID
rounds() { grep -ac '^GUEST ROUND' "$W/serial.txt" || true; }
guest_says 60 'ROUND 2'
for _ in 1 2 3; do
    before=$(rounds)
    sleep 1.$((RANDOM % 9))
    restart
    more() { [ "$(rounds)" -gt $((before + 2)) ]; }
    eventually 40 more || fail "the guest makes no progress after a restart"
done
guest_said DONE && fail "the guest was done before the last restart: nothing was tested"
guest_says 90 DONE
guest_said VERIFIED || fail "the guest did not verify"
wait $qemu || fail "QEMU ended with an error"
say "three restarts with SIG$signal under a guest, $(rounds) rounds, $(grep -a LOST-AND "$W/serial.txt" | tr -d '\r')"
compact_kindly
stop_server
judge "$image"
lean "$image" 102
