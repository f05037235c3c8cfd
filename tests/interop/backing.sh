#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# Images that lie on others. Whatever lies below (QCOW2, raw, several deep, shorter, longer, named in every way that
# QEMU knows), the disk is the one that QEMU sees, as opened, after random guest I/O, after `zeroes` and `compact`, and
# after QEMU has written to it again; trims never bring old data back, and what lies below is never written.
#
# Usage: backing.sh 2|3 [all]. The version of the overlay. Without "all" it has clusters of 512 bytes and 64 KiB, and one of
# version 2 only what depends on the version.
. "$(dirname "$0")/../lib.sh"
need qemu-img qemu-io jq
version=${1:?the version of the overlay}
clusters=(512 64k) part=
[ "${2:-}" != all ] || clusters=(512 4k 64k 2M)
[ "$version${2:-}" != 2 ] || part=1
compat=$([ "$version" = 2 ] && echo 0.10 || echo 1.1)
seed=${QLEAN_SEED:-$RANDOM}
say "seed $seed"

# fill FORMAT FILE SIZE SEED: data of many lengths, with holes and zeroes between them
fill() {
    "$PYTHON" - "$2" "$3" "$4" >"$W/fill.txt" <<'END'
import random, sys
size, r = int(sys.argv[2]), random.Random(sys.argv[3])
for _ in range(40):
    at = r.randrange(0, size) & ~511
    n = min(r.choice((512, 4096, 65536, 300000)) & ~511, size - at)
    if n:
        print(f"write -z {at} {n}" if r.random() < 0.2 else f"write -P {r.randint(1, 255)} {at} {n}")
END
    qemu-io -t unsafe -f "$1" "$2" <"$W/fill.txt" >/dev/null
}

# without_format IMAGE: its header no longer says which format the backing file has
without_format() {
    "$PYTHON" - "$1" <<'END'
import struct, sys
with open(sys.argv[1], "r+b") as f:
    head = bytearray(f.read(512))
    at = 72 if struct.unpack_from(">I", head, 4)[0] == 2 else struct.unpack_from(">I", head, 100)[0]
    while struct.unpack_from(">I", head, at)[0] != 0xe2792aca:
        at += 8 + (struct.unpack_from(">I", head, at + 4)[0] + 7 & ~7)
    struct.pack_into(">I", head, at, 0x716c6561)  # an extension that nobody knows
    f.seek(0)
    f.write(head)
END
}

# map_of NAME...: what qemu-img map says, in the fewest words. Zeroes with a place of their own are data to some only.
map_of() {
    qemu-img map --output=json "$@" | jq -c '[.[] | {start, length, zero, data: (.data and (.zero | not))}] | reduce .[] as $e ([];
        if length > 0 and .[-1].zero == $e.zero and .[-1].data == $e.data then .[-1].length += $e.length else . + [$e] end) | .[]'
}

# exercise CASE IMAGE: all of it
exercise() {
    local what=$1 image=$2 model=$W/$1.raw below before
    below=$(find "$W" -name 'base*' -newermt 1970-01-01 | sort)
    # shellcheck disable=SC2086
    before=$(cat $below | sha256sum)
    qemu-img convert -f qcow2 -O raw "$image" "$model"
    map_of -f qcow2 "$image" >"$W/map-qemu"
    start_server "$image"
    map_of -f raw "$URI" >"$W/map-qlean"
    cmp "$W/map-qemu" "$W/map-qlean" || fail "$what: block status differs: $(diff "$W/map-qemu" "$W/map-qlean")"
    nbdcopy "$URI" "$W/out"
    cmp "$model" "$W/out" || fail "$what: reading differs from qemu-img convert"
    rm "$W/out"
    guest --model "$model" --requests 150 --connections 2 --largest 400000 --seed "$seed" >"$W/guest.txt" ||
        fail "$what: $(cat "$W/guest.txt")"
    compact
    guest --model "$model" --requests 60 --seed $((seed + 1)) >"$W/guest.txt" || fail "$what: $(cat "$W/guest.txt")"
    compact
    stop_server
    judge "$image" "$model"
    # QEMU writes to it again, and to its model.
    "$PYTHON" - "$(length "$model")" "$seed" >"$W/again.txt" <<'END'
import random, sys
size, r = int(sys.argv[1]), random.Random(int(sys.argv[2]))
for _ in range(10):
    at = r.randrange(0, size) & ~511
    print(f"write -P {r.randint(1, 255)} {at} {min(70144, size - at)}")
END
    qemu-io -f qcow2 "$image" <"$W/again.txt" >/dev/null
    qemu-io -f raw "$model" <"$W/again.txt" >/dev/null
    start_server "$image" -r
    nbdcopy "$URI" "$W/out"
    cmp "$model" "$W/out" || fail "$what: reading differs after QEMU has written"
    rm "$W/out"
    stop_server
    judge "$image" "$model"
    # shellcheck disable=SC2086
    [ "$(cat $below | sha256sum)" = "$before" ] || fail "$what: what lies below was changed"
    say "$what: $(length "$image") bytes"
    rm -rf "$model" "$W/images"
}

images=$W/images
# overlay CLUSTER BACKING FORMAT [SIZE]: images/sub/top.qcow2 over a name that is relative to that directory
overlay() {
    mkdir -p "$images/sub"
    (cd "$images/sub" && create -o "compat=$compat,cluster_size=$1" -b "$2" -F "$3" top.qcow2 ${4:+"$4"})
    fill qcow2 "$images/sub/top.qcow2" "$(qemu-img info --output=json "$images/sub/top.qcow2" | jq '."virtual-size"')" "$seed$1"
}
base() { # base FORMAT NAME SIZE [qemu-img's options]
    mkdir -p "$images"
    qemu-img create -q -f "$1" "${@:4}" "$images/$2" "$3"
    fill "$1" "$images/$2" "$3" "$seed$3"
}
M=$((1 << 20))
for cluster in "${clusters[@]}"; do
    size=$((12 * M + 512)) # no multiple of a cluster
    top=$images/sub/top.qcow2
    base qcow2 base.qcow2 $size
    overlay $cluster ../base.qcow2 qcow2
    exercise "qcow2-$cluster" "$top"

    base qcow2 base.qcow2 $((5 * M + 1536)) -o cluster_size=4k
    overlay $cluster ../base.qcow2 qcow2 $size
    exercise "shorter-$cluster" "$top"

    base raw base.raw $((20 * M))
    overlay $cluster ../base.raw raw $size
    exercise "longer-$cluster" "$top"

    [ -z "$part" ] || continue
    base raw base.raw $size
    overlay $cluster ../base.raw raw
    exercise "raw-$cluster" "$top"

    base raw base.raw $((9 * M))
    (cd "$images" && create -o cluster_size=4k -b base.raw -F raw base1.qcow2 $((7 * M + 1024)))
    fill qcow2 "$images/base1.qcow2" $((7 * M + 1024)) 1
    (cd "$images" && create -o compat=0.10 -b base1.qcow2 -F qcow2 base2.qcow2 $size)
    fill qcow2 "$images/base2.qcow2" $size 2
    overlay $cluster ../base2.qcow2 qcow2
    exercise "deep-$cluster" "$top"
done

base raw base.raw $((6 * M))
overlay 64k ../base.raw raw
qemu-img resize -q "$top" 64M
exercise grown "$top"

for format in qcow2 raw; do
    base $format base.$format $((8 * M))
    overlay 64k ../base.$format $format
    without_format "$top"
    exercise "no-format-$format" "$top"
done
[ -z "$part" ] || exit 0

base qcow2 base.qcow2 $((8 * M))
qemu-img convert -c -O qcow2 "$images/base.qcow2" "$images/base-compressed.qcow2"
overlay 64k "json:{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":\"$images/base-compressed.qcow2\"}}" qcow2
exercise json "$top"

base raw base.raw $((8 * M))
overlay 64k "json:{'driver':'raw','offset':66048,'size':4194304,'file.filename':'$images/base.raw'}" raw
exercise json-part "$top"

base qcow2 base.qcow2 $((8 * M))
overlay 64k "file:$images/base.qcow2" qcow2
exercise file-prefix "$top"
