#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# Usage: snapshots.sh CLUSTER [OPTIONS]. An image with internal snapshots made by qemu-img between random writes, of that cluster
# size (and further creation options): whatever the guest, `zeroes`, `compact` and the deletion of other snapshots do to
# it, every snapshot stays what it was, read through its export and by qemu-img; the image is clean; the file becomes
# as short as what is in it, and when the last snapshot is gone as lean as one without.
. "$(dirname "$0")/../lib.sh"
need qemu-img qemu-io nbdcopy nbdinfo
cluster=${1:?cluster size}
options=${2:+,$2}
size=${3:-16M}
image=$W/i.qcow2
SNAPSHOTS=()

# disturb COUNT: random writes, zeroes and discards by QEMU
disturb() {
    local commands=() n at
    for ((n = 0; n < $1; n++)); do
        at=$((RANDOM * 32768 % (14 * 1048576) + RANDOM))
        case $((RANDOM % 6)) in
        0) commands+=(-c "discard $((at / 65536 * 65536)) 192k") ;;
        1) commands+=(-c "write -z $at 100k") ;;
        *) commands+=(-c "write -P $((RANDOM % 255 + 1)) $at $((RANDOM * 4 + 1))") ;;
        esac
    done
    qemu-io -f qcow2 -d unmap "${commands[@]}" "$image" >/dev/null
}

# Refcounts of 2 bits have room for the disk and two snapshots.
few=
[[ $options != *refcount_bits=2* ]] || few=1

take() { # take NAME [many]: a snapshot, and what is in it
    [ -z "$few" ] || [ $# = 1 ] || return 0
    qemu-img snapshot -c "$1" "$image"
    qemu-img convert -f qcow2 -O raw -l "snapshot.name=$1" "$image" "$W/$1.raw"
    SNAPSHOTS+=("$1")
}

drop() { # NAME is no longer expected
    local s left=()
    for s in "${SNAPSHOTS[@]}"; do [ "$s" = "$1" ] || left+=("$s"); done
    SNAPSHOTS=("${left[@]}")
}

served() { # every snapshot, through its export
    local s
    for s in "${SNAPSHOTS[@]}"; do
        nbdcopy "$(export_uri "snapshot/$s")" "$W/read.raw"
        cmp "$W/read.raw" "$W/$s.raw" || fail "export snapshot/$s is not what the snapshot was ($1)"
        rm "$W/read.raw"
    done
}

intact() { # the image as QEMU sees it, after the server has gone
    local s
    judge "$image" "$W/model"
    for s in "${SNAPSHOTS[@]}"; do
        qemu-img convert -f qcow2 -O raw -l "snapshot.name=$s" "$image" "$W/read.raw"
        cmp "$W/read.raw" "$W/$s.raw" || fail "QEMU reads another snapshot $s ($1)"
    done
    rm -f "$W/read.raw"
    [ "$(qemu-img snapshot -l "$image" | tail -n +3 | wc -l)" = ${#SNAPSHOTS[@]} ] || fail "not ${#SNAPSHOTS[@]} snapshots ($1)"
}

# short: the file holds little but what has a refcount
short() {
    "$PYTHON" - "$image" <<'END' || fail "the file is longer than what it holds ($1)"
import struct, sys
with open(sys.argv[1], "rb") as f:
    image = f.read()
bits, = struct.unpack_from(">I", image, 20)
table, clusters = struct.unpack_from(">QI", image, 48)
order = struct.unpack_from(">I", image, 96)[0] if struct.unpack_from(">I", image, 4)[0] == 3 else 4
size, used = 1 << bits, 0
for i in range(clusters * size // 8):
    block, = struct.unpack_from(">Q", image, table + i * 8)
    counts = image[block:block + size] if block else b""
    if order >= 3:
        step = 1 << order - 3
        used += sum(any(counts[at:at + step]) for at in range(0, len(counts), step))
    else:
        width = 1 << order
        used += sum(byte >> shift & (1 << width) - 1 != 0 for byte in counts for shift in range(0, 8, width))
have = len(image) // size
print(f"{have} clusters, {used} in use")
sys.exit(have > used + max(used // 50, 2))
END
}

create -o "cluster_size=$cluster$options" "$image" "$size"
disturb 40
take one
disturb 15
take two
take three many # shares every table with two
disturb 10
qemu-img convert -f qcow2 -O raw "$image" "$W/model"
judge "$image" "$W/model"

start_server "$image"
nbdinfo --list "nbd+unix://?socket=$SOCK" >"$W/list.txt"
for s in "${SNAPSHOTS[@]}"; do
    grep -q "export=\"snapshot/$s\"" "$W/list.txt" || fail "no export snapshot/$s"
done
served 'as opened'
guest --model "$W/model" --requests 200 --largest 262144 >"$W/guest.log" 2>&1 || fail "$(cat "$W/guest.log")"
served 'after a guest'
stop_server
intact 'after a guest'
say "guest: ok"

start_server "$image"
guest_beside --model "$W/model" --largest 262144 --connections 3
run_pid "$W/qlean.log" "$QLEAN" compact --fast "$SOCK"
while kill -0 "$PID" 2>/dev/null; do served 'beside a guest and compact'; done
wait "$PID" || fail "qlean compact: $(tail -n 3 "$W/qlean.log")"
served 'beside a guest and after compact'
compact
guest_end
compact
served 'after compact'
stop_server
intact 'after compact'
say "compact: $(short 'after compact')"

disturb 10
take four many
qemu-img convert -f qcow2 -O raw "$image" "$W/model"
start_server "$image"
"$QLEAN" snapshot list "$SOCK" >"$W/snapshots.txt"
for s in "${SNAPSHOTS[@]}"; do grep -qw "$s" "$W/snapshots.txt" || fail "qlean snapshot list does not show $s"; done
nbdsh_beside "$(export_uri snapshot/two)" 'import time; h.pread(1, 0); open("'"$W"'/open","w"); time.sleep(60)'
reader=$PID
eventually 10 test -e "$W/open"
expect_failure "deleting an open snapshot" "$QLEAN" snapshot delete "$SOCK" two
grep -q 'being read' "$W/failed.txt" || fail "the refusal does not say why: $(cat "$W/failed.txt")"
end_pid $reader
guest_beside --model "$W/model" --largest 262144
eventually 10 "$QLEAN" snapshot delete "$SOCK" two 2>>"$W/qlean.log" || fail "snapshot delete: $(cat "$W/qlean.log")"
drop two
served 'after a deletion'
"$QLEAN" snapshot delete "$SOCK" 1 || fail "snapshot delete by id"
drop one
served 'after two deletions'
guest_end
expect_failure "deleting what is not there" "$QLEAN" snapshot delete "$SOCK" one
stop_server
intact 'after deletions'
say "delete: ok"

start_server "$image"
compact
compact
"$QLEAN" snapshot list --json "$SOCK" | jq -e '.snapshots | length == '${#SNAPSHOTS[@]} >/dev/null || fail "the page does not list two snapshots"
served 'after deletions and compact'
stop_server
intact 'after deletions and compact'
say "compact: $(short 'after deletions and compact')"

# A file, without a server of ours.
for s in "${SNAPSHOTS[@]}"; do
    "$QLEAN" snapshot delete "$image" "$s" || fail "snapshot delete of a file"
    drop "$s"
    intact "without $s"
done
"$QLEAN" compact -q "$image"
judge "$image" "$W/model"
lean "$image" 103
