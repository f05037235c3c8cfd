#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# Persistent bitmaps: what QEMU finds in them after we have served the image is what was written, by it and through us;
# disabled and inconsistent ones keep what they have; a killed server leaves the enabled ones inconsistent and nothing
# corrupt; compact moves all of it. The first argument is the cluster size.
. "$(dirname "$0")/../lib.sh"
need qemu-img qemu-io qemu-nbd nbdinfo jq

cluster=${1:-64k}
size=$((96 << 20))
image=$W/disk.qcow2

# A model is a file with a byte for each 512 bytes of the disk, 1 where something was changed.
cat >"$W/model.py" <<'END'
import json, os, random, sys
SECTOR = 512

def mark(path, offset, length):
    with open(path, "r+b") as f:
        first = offset // SECTOR
        f.seek(first)
        f.write(b"\x01" * ((offset + length - 1) // SECTOR - first + 1))

def io(handle, seed, models, count=150, area=None):
    r = random.Random(seed)
    size = area or handle.get_size()
    for _ in range(count):
        length = r.choice((1, 512, 4096, 65536, 300000))
        offset = r.randrange(size - length)
        what = r.random()
        if what < 0.6:
            handle.pwrite(r.randbytes(length), offset)
        elif what < 0.8:
            handle.zero(length, offset)
        else:
            handle.trim(length, offset)
        for model in models:
            mark(model, offset, length)
    handle.flush()

def compare(path, granularity, maps):
    model = open(path, "rb").read()
    per = granularity // SECTOR
    want = [int(any(model[i:i + per])) for i in range(0, len(model), per)]
    got = [0] * len(want)
    for e in json.load(open(maps)):
        if e["type"] & 1:
            for i in range(e["offset"] // granularity, -(-(e["offset"] + e["length"]) // granularity)):
                got[i] = 1
    wrong = [i for i in range(len(want)) if want[i] != got[i]]
    if wrong:
        sys.exit(f"{maps}: {len(wrong)} of {len(want)} bits are wrong, the first for offset {wrong[0] * granularity}: "
                 f"{got[wrong[0]]}")
    print(f"  {os.path.basename(maps)}: {sum(want)} of {len(want)} bits set, as in the model")

if __name__ == "__main__" and sys.argv[1] == "compare":
    compare(sys.argv[2], int(sys.argv[3]), sys.argv[4])
if __name__ == "__main__" and sys.argv[1] == "mark":
    mark(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
END

# bits NAME: what QEMU finds in a bitmap, as $W/NAME.json
bits() {
    local sock=$W/qemu.sock pid
    rm -f "$sock"
    run_pid "$W/qemu-nbd.log" qemu-nbd -r -f qcow2 -B "$1" -k "$sock" "$image"
    pid=$PID
    eventually 10 test -S "$sock" || fail "qemu-nbd does not export bitmap $1: $(tail -n 2 "$W/qemu-nbd.log")"
    nbdinfo --json --map="qemu:dirty-bitmap:$1" "nbd+unix:///?socket=$sock" >"$W/$1.json"
    gone "$pid" || fail "qemu-nbd does not end"
}
# equal NAME GRANULARITY: that is the model
equal() {
    bits "$1"
    "$PYTHON" "$W/model.py" compare "$W/$1.model" "$2" "$W/$1.json" || fail "bitmap $1 is not what was written"
}
# flags NAME: as qemu-img has them
flags() {
    qemu-img info -U --output=json "$image" |
        jq -r --arg n "$1" '."format-specific".data.bitmaps[] | select(.name == $n) | .flags | join(",")'
}
expect_flags() { [ "$(flags "$1")" = "$2" ] || fail "bitmap $1 has the flags '$(flags "$1")', not '$2'"; }
qemu_writes() { # OFFSET LENGTH
    qemu-io -f qcow2 -c "write -P $((RANDOM % 255 + 1)) $1 $2" "$image" >/dev/null
    for m in coarse fine; do "$PYTHON" "$W/model.py" mark "$W/$m.model" "$1" "$2"; done
}
ours() { # SEED COUNT [AREA]
    nbdsh_do "$URI" "
import sys; sys.path.insert(0, '$W'); import model
model.io(h, $1, ['$W/coarse.model', '$W/fine.model'], $2, ${3:-None})"
}

for m in coarse fine; do head -c $((size / 512)) /dev/zero >"$W/$m.model"; done
create -o cluster_size="$cluster" "$image" $size
# One that is inconsistent, because QEMU was killed; one that was disabled after something was written; two enabled.
qemu-img bitmap --add "$image" broken
rm -f "$W/killed.sock"
run_pid "$W/qemu-nbd.log" qemu-nbd -f qcow2 -k "$W/killed.sock" "$image"
eventually 10 test -S "$W/killed.sock" || fail "qemu-nbd does not start" # by then it has opened all of the image
eventually 10 sh -c "qemu-img info -U '$image' | grep -q in-use" || fail "qemu-nbd does not use the bitmap"
kill -KILL "$PID"
{ wait "$PID" || true; } 2>/dev/null
expect_flags broken in-use,auto
qemu-img bitmap --add -g 4096 "$image" off
qemu_writes 1048576 200704
for m in coarse fine; do head -c $((size / 512)) /dev/zero >"$W/$m.model"; done
qemu-img bitmap --disable "$image" off
qemu-img bitmap --add "$image" coarse
qemu-img bitmap --add -g 512 "$image" fine
qemu_writes 33554432 65536
bits off
mv "$W/off.json" "$W/off-before.json"

say "nothing but reading leaves the image as it is"
before=$(sha "$image")
start_server "$image"
nbdcopy "$URI" "$W/raw"
stop_server
# (With 512 bytes, refcount blocks are linked ahead of the end even if nothing is written.)
[ "$cluster" = 512 ] || [ "$(sha "$image")" = "$before" ] || fail "reading changed the image"

say "what is written through us"
start_server "$image"
ours 1 150
stop_server
judge "$image"
expect_flags coarse auto
equal coarse 65536
equal fine 512

say "while compact moves everything"
start_server "$image"
nbdsh_do "$URI" 'h.trim(24 << 20, 4 << 20)'
for m in coarse fine; do "$PYTHON" "$W/model.py" mark "$W/$m.model" $((4 << 20)) $((24 << 20)); done
compact
ours 2 60
compact
[ "$(status .compact.pending)" = 0 ] || fail "something is still to be moved: $(status .compact)"
nbdcopy "$URI" "$W/raw"
stop_server
judge "$image" "$W/raw"
equal coarse 65536
equal fine 512
bytes=$(qemu-img info --output=json "$image" | jq '."cluster-size"')
ideal=$(($(converted_length "$image") + (1 << 19) + 9 * bytes)) # a copy has no bitmaps
[ "$(length "$image")" -le $ideal ] || fail "the image is $(length "$image") bytes long, more than $ideal"

say "QEMU continues, and we again"
qemu_writes 50331648 131072
equal coarse 65536
equal fine 512
start_server "$image"
ours 3 40
stop_server
judge "$image"
equal coarse 65536
equal fine 512
expect_flags off ''
expect_flags broken in-use,auto
bits off
cmp "$W/off.json" "$W/off-before.json" || fail "the disabled bitmap changed"

say "a compaction without a write leaves them consistent, even if it is killed"
start_server "$image"
compact
kill_server
judge_killed "$image"
expect_flags coarse auto
equal coarse 65536

say "a killed server leaves them inconsistent, and the disabled one as it was"
start_server "$image"
ours 4 20
expect_flags coarse in-use,auto
kill_server
judge_killed "$image"
expect_flags coarse in-use,auto
expect_flags fine in-use,auto
expect_flags off ''
bits off
cmp "$W/off.json" "$W/off-before.json" || fail "the disabled bitmap changed"
start_server "$image"
ours 5 20
compact
stop_server
judge "$image"
expect_flags coarse in-use,auto
qemu-img bitmap --remove "$image" coarse
qemu-img bitmap --remove "$image" fine
qemu-img bitmap --remove "$image" broken
judge "$image"

say "bitmaps that do not count (autoclear bit clear) are ignored, and their clusters are given back"
printf '\0' | dd of="$image" bs=1 seek=95 conv=notrunc status=none
start_server "$image"
ours 6 20
compact
stop_server
judge "$image"

say "a directory that QEMU refuses is refused"
create "$W/bad.qcow2" 16M
qemu-img bitmap --add "$W/bad.qcow2" one
directory=$("$PYTHON" - "$W/bad.qcow2" <<'END'
import struct, sys
data = open(sys.argv[1], "rb").read(65536)
at = struct.unpack(">I", data[100:104])[0]
while True:
    kind, n = struct.unpack(">II", data[at:at + 8])
    if kind == 0x23852875:
        print(struct.unpack(">Q", data[at + 24:at + 32])[0])
        break
    at += 8 + (n + 7) // 8 * 8
END
)
printf '\xff' | dd of="$W/bad.qcow2" bs=1 seek=$((directory + 16)) conv=notrunc status=none
! qemu-io -f qcow2 -r -c 'read 0 1' "$W/bad.qcow2" >/dev/null 2>&1 || fail "QEMU opens a broken directory"
! nbdkit -U - "$PLUGIN" file="$W/bad.qcow2" --run true 2>"$W/err.txt" || fail "a broken directory is served"
grep -q "bitmap 'one' has an unknown type" "$W/err.txt" || fail "no sentence: $(cat "$W/err.txt")"
