#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# Snapshots with VM state, made by QEMU's savevm: the state lies beyond the end of the disk, in the snapshot's tables only.
# It is kept, byte for byte, through a guest, compaction and the deletion of another snapshot, and QEMU loads it again.
. "$(dirname "$0")/../lib.sh"
need qemu-img qemu-io qemu-system-x86_64
image=$W/i.qcow2

# monitor COMMAND...: a machine that does not run, on the image; its answers
monitor() {
    printf '%s\n' "$@" quit | timeout 60 qemu-system-x86_64 -accel tcg -m 64 -display none -nodefaults -vga none -S \
        -drive "file=$image,format=qcow2,if=virtio,discard=unmap" -monitor stdio 2>&1
}

# state NAME: the checksum of what the snapshot maps beyond the end of its disk
state() {
    "$PYTHON" - "$image" "$1" <<'END'
import hashlib, struct, sys
with open(sys.argv[1], "rb") as f:
    image = f.read()
bits, size = struct.unpack_from(">IQ", image, 20)
count, at = struct.unpack_from(">IQ", image, 60)
cluster, mask, found = 1 << bits, 0x00fffffffffffe00, None
for _ in range(count):
    at = (at + 7) & ~7
    l1, entries, id_size, name_size = struct.unpack_from(">QIHH", image, at)
    extra, = struct.unpack_from(">I", image, at + 36)
    name = image[at + 40 + extra + id_size:][:name_size].decode()
    if name == sys.argv[2]:
        found = l1, entries, struct.unpack_from(">Q", image, at + 40)[0]
    at += 40 + extra + id_size + name_size
l1, entries, state_size = found
digest, mapped, first = hashlib.sha256(), 0, -(-size // (cluster * cluster // 8))
for i in range(first, entries):
    table = struct.unpack_from(">Q", image, l1 + i * 8)[0] & mask
    for n in range(cluster // 8 if table else 0):
        word, = struct.unpack_from(">Q", image, table + n * 8)
        if word & mask:
            mapped += 1
            digest.update(struct.pack(">QQ", i, n) + image[word & mask:][:cluster])
assert mapped * cluster >= state_size > 0, (mapped, state_size)
print(digest.hexdigest(), mapped)
END
}

create -o cluster_size=4096 "$image" 8M
qemu-io -f qcow2 -c 'write -P 1 0 6M' "$image" >/dev/null
monitor 'savevm first' >"$W/monitor.log"
qemu-io -f qcow2 -c 'write -P 2 1M 3M' -c 'discard 5M 1M' "$image" >/dev/null
monitor 'savevm second' >>"$W/monitor.log"
qemu-img snapshot -l "$image" | grep -q second || fail "no snapshot with VM state: $(cat "$W/monitor.log")"
# The active image loses what it had, so the file is full of holes and the snapshots lie at its end.
qemu-io -f qcow2 -d unmap -c 'discard 0 8M' -c 'write -P 3 0 1M' "$image" >/dev/null
qemu-img convert -f qcow2 -O raw "$image" "$W/model"
first=$(state first) second=$(state second)
say "VM state: ${first#* } and ${second#* } clusters"

start_server "$image"
"$QLEAN" snapshot list --json "$SOCK" | jq -e '.snapshots | map(.vm_state_size > 0) | all' >/dev/null || fail "no VM state is listed"
guest --model "$W/model" --requests 100 --largest 262144 >"$W/guest.log" 2>&1 || fail "$(cat "$W/guest.log")"
compact
compact
stop_server
judge "$image" "$W/model"
[ "$(state first)" = "$first" ] || fail "the VM state of the first snapshot changed"
[ "$(state second)" = "$second" ] || fail "the VM state of the second snapshot changed"
end=$(qemu-img check --output=json "$image" | jq '."image-end-offset"')
"$QLEAN" status --json "$image" | jq -e ".clusters.in_use * 4096 * 102 / 100 >= $end" >/dev/null ||
    fail "the file ends at $end: $("$QLEAN" status --json "$image" | jq -c .clusters)"

"$QLEAN" snapshot delete "$image" first || fail "snapshot delete"
"$QLEAN" compact -q "$image"
judge "$image" "$W/model"
[ "$(state second)" = "$second" ] || fail "the VM state of the second snapshot changed when the first was deleted"
monitor 'loadvm second' 'info status' >"$W/monitor.log"
grep -q 'VM status: paused' "$W/monitor.log" && ! grep -qi error "$W/monitor.log" || fail "loadvm: $(cat "$W/monitor.log")"
qemu-img check -f qcow2 "$image" >/dev/null || fail "check after loadvm"
