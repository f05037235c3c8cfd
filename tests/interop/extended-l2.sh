#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# Usage: extended-l2.sh sizes|space|trims|backing. Images with extended L2 entries: clusters of 32 subclusters with states of
# their own.
#   sizes: every cluster size, written by QEMU first: served, written, trimmed, compacted beside the guest, judged,
#          written by QEMU again and served again; the map that the server shows is QEMU's.
#   space: a write takes subclusters, not clusters; a trim gives subclusters back to the host, and the cluster when
#          nothing is left in it.
#   trims: pieces smaller than a subcluster.
#   backing: what lies below shows through subclusters that are not allocated, and only through them.
. "$(dirname "$0")/../lib.sh"
need qemu-img qemu-io jq
kib=1024 mib=$((1024 * 1024))

# by_qemu IMAGE SEED: QEMU writes, zeroes and discards pieces of any size
by_qemu() {
    local size
    size=$(qemu-img info --output=json "$1" | jq '."virtual-size"')
    "$PYTHON" - "$2" "$size" <<'END' | qemu-io -f qcow2 "$1" >/dev/null
import random, sys
r, size = random.Random(int(sys.argv[1])), int(sys.argv[2])
for _ in range(120):
    length = min(r.choice((512, 2048, 4096, 16384, 65536, 300000 // 512 * 512)), size)
    at = r.randrange(size - length + 1) & ~511
    print(r.choice((f"write -P {r.randint(1, 255)}", f"write -P {r.randint(1, 255)}", "write -z", "write -z -u", "discard")), at, length)
END
}

# same_map IMAGE: the server shows data and zeroes as QEMU does, which looks for holes inside of subclusters, too
same_map() {
    qemu-img map -U --output=json -f qcow2 "$1" >"$W/map.qemu"
    qemu-img map --output=json -f raw "$URI" >"$W/map.ours"
    "$PYTHON" - "$(qemu-img info -U --output=json "$1" | jq '."cluster-size" / 32')" "$W/map.qemu" "$W/map.ours" <<'END' || fail "the maps of $1 differ"
import json, sys
size = int(sys.argv[1])
def data(name):
    runs = [e for e in json.load(open(name)) if not e["zero"]]
    return {s for e in runs for s in range(e["start"] // size, (e["start"] + e["length"] + size - 1) // size)}
qemu, ours = map(data, sys.argv[2:])
for s in sorted(qemu ^ ours)[:8]:
    print(f"subcluster at {s * size} is data for {'QEMU' if s in qemu else 'the server'} only", file=sys.stderr)
sys.exit(qemu != ours)
END
}

sizes() {
    local bits image
    for bits in $(seq 14 21); do
        image=$W/$bits.qcow2
        create -o extended_l2=on,cluster_size=$((1 << bits)) "$image" $((24 * mib + 3 * 512))
        by_qemu "$image" "$bits"
        qemu-img convert -f qcow2 -O raw "$image" "$W/model"
        start_server --reclaim "$image"
        same_map "$image"
        busy "$bits" 250 --largest 262144
        stop_server
        judge "$image" "$W/model"
        lean "$image" 102
        by_qemu "$image" "$((bits + 100))"
        again "$image" "$bits" 50 --largest 262144
        rm "$image"
    done
}

# at_most IMAGE BYTES WHAT: the host's allocation comes down to so much
below() { [ "$(allocated "$1")" -le "$2" ]; }
at_most() {
    eventually 15 below "$1" "$2" || fail "$3: $(allocated "$1") bytes allocated, more than $2"
    say "$3: $(allocated "$1") bytes allocated, at most $2"
}

space() {
    local image=$W/space.qcow2 metadata
    create -o extended_l2=on,cluster_size=2M "$image" 64M
    start_server "$image"
    nbdsh_do "$URI" 'h.pwrite(bytes([1]) * 512, 0); h.flush()'
    metadata=$(($(allocated "$image") + 2 * mib)) # an L2 table is reserved whole
    nbdsh_do "$URI" '
for c in range(32): h.pwrite(bytes([7]) * 512, (c << 21) + 5 * 65536)
h.flush()'
    at_most "$image" $((metadata + 33 * 64 * kib)) "32 writes of 512 bytes to 32 clusters of 2 MiB"
    random_file "$W/model" 64M
    nbdcopy --flush "$W/model" "$URI"
    for verb in trim zero; do # every second subcluster, in random order
        nbdsh_do "$URI" "
import random
todo = [(c << 21) + (s << 16) for c in range(16 if '$verb' == 'trim' else 0, 32 if '$verb' == 'trim' else 16) for s in range(0, 32, 2)]
random.Random(5).shuffle(todo)
for at in todo: h.$verb(65536, at)
h.flush()"
    done
    at_most "$image" $((metadata + 32 * mib)) "every second subcluster given up"
    same_map "$image"
    nbdsh_do "$URI" '
for c in range(32):
    for s in range(1, 32, 2):
        if c != 9: h.trim(65536, (c << 21) + (s << 16))
h.flush()'
    at_most "$image" $((metadata + 1 * mib)) "all but one cluster given up"
    nbdcopy "$URI" "$W/raw"
    compact
    lean "$image" 101
    # A cluster that is used again holds only what is written to it, whatever it held before.
    nbdsh_do "$URI" '
h.pwrite(bytes([3]) * (16 << 20), 32 << 20)
h.flush()
h.trim(16 << 20, 32 << 20)
for c in range(8): h.pwrite(bytes([9]) * 512, (48 << 20) + (c << 21))
h.flush()
h.pwrite(bytes(512) * 8 * 4096, 0)
h.flush()'
    same_map "$image"
    nbdcopy "$URI" "$W/raw"
    stop_server
    judge "$image" "$W/raw"
}

trims() {
    local image=$W/trims.qcow2
    create -o extended_l2=on,cluster_size=16k "$image" 16M # subclusters of 512 bytes, eight to a block of the host
    random_file "$W/model" 16M
    start_server "$image"
    nbdcopy --flush "$W/model" "$URI"
    nbdsh_do "$URI" '
import random
todo = [at for at in range(4 << 20, 12 << 20, 512) if at // 512 % 32 < 24]
random.Random(6).shuffle(todo)
for at in todo: h.trim(512, at)
h.flush()'
    at_most "$image" $((10 * mib + 512 * kib)) "24 of 32 subclusters of half of the clusters given up"
    "$PYTHON" - "$W/model" <<'END'
import sys
with open(sys.argv[1], "r+b") as f:
    for at in range(4 << 20, 12 << 20, 16384):
        f.seek(at)
        f.write(bytes(24 * 512))
END
    same_map "$image"
    nbdcopy "$URI" "$W/raw"
    cmp "$W/raw" "$W/model"
    compact
    guest --model "$W/model" --requests 300 --largest 1500 >"$W/guest.log" 2>&1 || fail "$(cat "$W/guest.log")"
    stop_server
    judge "$image" "$W/model"
}

backing() {
    local bits below image=$W/overlay.qcow2 base
    random_file "$W/base.raw" $((10 * mib + 512)) # shorter than the disk, and no multiple of a subcluster
    create "$W/base.qcow2" $((14 * mib))
    qemu-io -f qcow2 -c 'write -P 5 1M 3M' -c 'write -P 6 9000k 700k' -c 'write -z 2M 100k' "$W/base.qcow2" >/dev/null
    create -o extended_l2=on -b "$W/base.raw" -F raw "$W/middle.qcow2" $((16 * mib)) # longer than the disk
    by_qemu "$W/middle.qcow2" 1
    for below in base.raw base.qcow2 middle.qcow2; do
        for bits in 14 16 21; do
            base=$(sha "$W/$below")
            create -o extended_l2=on,cluster_size=$((1 << bits)) -b "$W/$below" -F "${below#*.}" "$image" $((12 * mib + 512))
            by_qemu "$image" "$bits"
            qemu-img convert -f qcow2 -O raw "$image" "$W/model"
            start_server "$image"
            nbdcopy "$URI" "$W/raw"
            cmp "$W/raw" "$W/model" || fail "$below, $bits: not what QEMU reads"
            busy "$below, $bits" 250 --largest 100000
            stop_server
            judge "$image" "$W/model"
            [ "$(sha "$W/$below")" = "$base" ] || fail "$below was changed"
            by_qemu "$image" "$((bits + 100))"
            again "$image" "$below, $bits" 50 --largest 262144
        done
    done
}

"${1:?sizes, space, trims or backing}"
