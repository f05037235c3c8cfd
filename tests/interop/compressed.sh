#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# Usage: compressed.sh zlib|zstd|damaged|narrow|scattered. Images that `qemu-img convert -c` made, of several cluster
# sizes and every refcount width: read, written by a guest, trimmed, compacted beside it (extents are packed anew, about
# as closely as they can be), overwritten, judged. And one with an extent that does not decompress; one with a snapshot,
# where the width of the refcounts decides how many extents go into a cluster; and one written in random order.
. "$(dirname "$0")/../lib.sh"

# content FILE MiB: some of it random, some text, some zeroes
content() {
    "$PYTHON" - "$1" "$2" <<'END'
import random, sys
r, letters = random.Random(2), (b"abcdefgh \n" * 26)[:256]
with open(sys.argv[1], "wb") as out:
    for _ in range(int(sys.argv[2]) * 16):
        kind, n = r.randrange(6), 65536
        if kind == 0:
            block = bytes(n)
        elif kind == 1:
            block = r.randbytes(n // 2) + bytes(n // 2)
        elif kind == 2:
            block = (r.randbytes(600) * (n // 600 + 1))[:n]
        elif kind == 3:
            block = bytes([r.randrange(256)]) * n
        else:
            block = r.randbytes(n).translate(letters)
        out.write(block)
END
}

# packed IMAGE PERCENT: its compressed extents lie in at most so many percent of the clusters that they need
packed() {
    local packs needed extents
    read -r packs needed extents _ < <("$PYTHON" "$TESTS/interop/packs.py" "$1")
    say "$extents extents in $packs clusters; their bytes fill $needed"
    [ $((packs * 100)) -le $((needed * $2 + 200)) ] || fail "$1: the extents are scattered"
}

# compact_all IMAGE: nothing is left to do, and doing it again does not make it longer
compact_all() {
    local before
    : >"$W/qlean.log"
    compact
    ! grep -q 'gained nothing' "$W/qlean.log" || fail "not all was done: $(grep 'gained nothing' "$W/qlean.log")"
    [ "$(status .compact.pending)" = 0 ] || fail "pending: $(status .compact)"
    before=$(length "$1")
    compact
    [ "$(length "$1")" -le "$before" ] || fail "compacted again, $1 has grown from $before to $(length "$1") bytes"
}

# life IMAGE MODEL: what happens to every image
life() {
    local image=$1 model=$2
    start_server "$image"
    nbdcopy "$URI" "$W/read.raw"
    cmp "$W/read.raw" "$model" || fail "$image reads wrongly"
    compact_all "$image" # nothing to gain
    guest --model "$model" --requests 60 --connections 2 --largest 200000 >"$W/guest.log" 2>&1 || fail "$(cat "$W/guest.log")"
    guest_beside --model "$model" --connections 2 --largest 200000 --pause 0.01
    compact
    compact
    guest_end
    compact_all "$image"
    stop_server
    judge "$image" "$model"
}

# trimmed IMAGE MODEL MiB: every other piece is trimmed
trimmed() {
    local image=$1 model=$2
    start_server "$image"
    "$PYTHON" - "$URI" "$model" "$3" <<'END'
import nbd, os, random, sys
h = nbd.NBD()
h.connect_uri(sys.argv[1])
r, size = random.Random(3), int(sys.argv[3]) << 20
with open(sys.argv[2], "r+b") as model:
    at = 0
    while at < size:
        n = min(r.choice((1, 2, 5)) << 16 if size > 1 << 24 else 1 << 13, size - at)
        if r.random() < 0.6:
            h.zero(n, at)
            model.seek(at)
            model.write(bytes(n))
        at += n
END
    compact_all "$image"
    # Asked again for a range, compressed extents that find no room would be counted again, and the end would rise.
    [ "$(status .fragmentation.compressed)" = 0 ] || [ "$(status .compact.most_by_request)" = null ] || fail "long ranges are asked for: $(status .compact)"
    [ "$(status .fragmentation.compressed)" = "$(qemu-img check -U -f qcow2 --output=json "$image" | jq '."compressed-clusters" // 0')" ] || fail "compressed clusters: $(status .fragmentation)"
    stop_server
    judge "$image" "$model"
}

one() {
    local cluster=$1 bits=$2 mebibytes=$3 compat=${4:-1.1} image=$W/a.qcow2
    say "clusters of $cluster bytes, refcounts of $bits bits, $type"
    local options=cluster_size=$cluster,compat=$compat
    [ "$compat" = 0.10 ] || options+=,refcount_bits=$bits,compression_type=$type
    content "$W/model" "$mebibytes"
    cp "$W/model" "$W/first"
    rm -f "$image"
    qemu-img convert -c -f raw -O qcow2 -o "$options" "$W/model" "$image"
    life "$image" "$W/model"

    cp "$W/first" "$W/model"
    qemu-img convert -c -f raw -O qcow2 -o "$options" "$W/model" "$image"
    trimmed "$image" "$W/model" "$mebibytes"
    [ "$bits" -lt 8 ] || [ "$cluster" -gt 1000000 ] || packed "$image" 108
    # QEMU goes on with it, compressing too.
    qemu-io -f qcow2 -c 'write -P 77 100000 300000' -c 'discard 2M 1M' -c 'write -c -P 78 2M 2M' "$image" >/dev/null || true
    qemu-img convert -f qcow2 -O raw "$image" "$W/model"
    start_server "$image"
    guest --model "$W/model" --requests 30 --largest 262144 >"$W/guest.log" 2>&1 || fail "after QEMU: $(cat "$W/guest.log")"
    stop_server
    judge "$image" "$W/model" # what was overwritten has let go of its clusters, before anything is moved
    start_server "$image"
    # All of it is overwritten: nothing compressed remains.
    "$PYTHON" - "$URI" "$W/model" <<'END'
import nbd, sys
h = nbd.NBD()
h.connect_uri(sys.argv[1])
size = h.get_size()
data = (bytes(range(1, 252)) * 4178)[:1 << 20]
with open(sys.argv[2], "wb") as model:
    for at in range(0, size, len(data)):
        h.pwrite(data[:size - at], at)
        model.write(data[:size - at])
END
    compact_all "$image"
    [ "$(status .fragmentation.compressed)" = 0 ] || fail "still compressed: $(status .fragmentation)"
    stop_server
    judge "$image" "$W/model"
    lean "$image" 102
}

# Small reads, one after the other, decompress each cluster once.
reads() {
    content "$W/model" 16
    qemu-img convert -c -f raw -O qcow2 -o "compression_type=$type" "$W/model" "$W/reads.qcow2"
    start_server "$W/reads.qcow2"
    "$PYTHON" - "$URI" "$W/model" <<'END'
import nbd, sys
h = nbd.NBD()
h.connect_uri(sys.argv[1])
model = open(sys.argv[2], "rb").read()
for at in range(0, len(model), 4096):
    assert h.pread(4096, at) == model[at:at + 4096], at
END
    local clusters
    clusters=$(status .fragmentation.compressed)
    [ "$(status .compression.decompressed)" = "$clusters" ] || fail "$clusters clusters were decompressed $(status .compression.decompressed) times"
    stop_server
}

damaged() {
    local image=$W/a.qcow2 first
    type=zlib
    content "$W/model" 16
    qemu-img convert -c -f raw -O qcow2 "$W/model" "$image"
    read -r _ _ _ first < <("$PYTHON" "$TESTS/interop/packs.py" "$image")
    "$PYTHON" "$TESTS/interop/packs.py" "$image" --damage "$first"
    start_server "$image"
    "$PYTHON" - "$URI" "$W/model" "$first" <<'END'
import nbd, sys
h = nbd.NBD()
h.connect_uri(sys.argv[1])
first, cluster = int(sys.argv[3]), 65536
def refused(do):
    try:
        do()
    except nbd.Error as error:
        assert error.errno == "EIO", error
    else:
        sys.exit("the damaged cluster can be used")
refused(lambda: h.pread(4096, first))
refused(lambda: h.pread(cluster, first))
refused(lambda: h.pwrite(b"x", first + 5))
refused(lambda: h.pread(3 * cluster, first))
h.pread(8 * cluster, first + cluster)
h.trim(8 * cluster, first + cluster)
END
    [[ $(status .last_error) == *"does not decompress"* ]] || fail "the error is not told: $(status .last_error)"
    dd if=/dev/zero of="$W/model" bs=64K seek=$((first / 65536 + 1)) count=8 conv=notrunc status=none
    # It is moved as it is.
    compact_all "$image"
    nbdsh_do "$URI" "h.pwrite(bytes(65536), $first)"
    dd if=/dev/zero of="$W/model" bs=64K seek=$((first / 65536)) count=1 conv=notrunc status=none
    compact_all "$image"
    stop_server
    judge "$image" "$W/model"
}

# Refcounts of 4 bits say 15 at most: 7 extents that a snapshot has too, where 12 would fit; 8 where some are the
# snapshot's alone.
narrow() {
    local image=$W/a.qcow2 clusters=480 n
    "$PYTHON" - "$W/model" $clusters <<'END'
import random, sys
r = random.Random(5)
with open(sys.argv[1], "wb") as out:
    for _ in range(int(sys.argv[2])):
        out.write(r.randbytes(4800) + bytes(65536 - 4800))
END
    qemu-img convert -c -f raw -O qcow2 -o refcount_bits=4 "$W/model" "$image"
    local commands=()
    for ((n = 0; n < clusters; n += 4)); do commands+=(-c "discard $((n * 65536)) 192k"); done
    qemu-io -f qcow2 -d unmap "${commands[@]}" "$image" >/dev/null
    qemu-img snapshot -c kept "$image"
    qemu-img convert -f qcow2 -O raw -l snapshot.name=kept "$image" "$W/kept"
    commands=()
    for ((n = 3; n < clusters; n += 16)); do commands+=(-c "write -P $((n % 250 + 1)) $((n * 65536)) 64k"); done
    qemu-io -f qcow2 "${commands[@]}" "$image" >/dev/null
    qemu-img convert -f qcow2 -O raw "$image" "$W/model"
    judge "$image"
    local before after
    read -r before _ < <("$PYTHON" "$TESTS/interop/packs.py" "$image")
    start_server "$image"
    compact
    read -r after _ < <("$PYTHON" "$TESTS/interop/packs.py" "$image")
    [ $((after * 2)) -le "$before" ] || fail "$before clusters with extents became $after"
    guest_beside --model "$W/model" --connections 2 --largest 20000 --pause 0.05
    compact
    guest_end
    compact_all "$image"
    stop_server
    judge "$image" "$W/model"
    qemu-img convert -f qcow2 -O raw -l snapshot.name=kept "$image" "$W/now"
    cmp "$W/now" "$W/kept" || fail "the snapshot is not what it was"
    "$QLEAN" snapshot delete "$image" kept
    judge "$image" "$W/model"
}

# Extents that lie in the file in another order than the guest's, half of them trimmed: packs come free late, and by one
# `qlean compact` the file is as short as by one that a limit makes slow, and as the next one leaves it.
scattered() {
    local image=$W/a.qcow2 clusters=1500 limit short lengths=()
    "$PYTHON" - "$W/model" "$image" $clusters <<'END'
import os, random, subprocess, sys
model, image, clusters, size = sys.argv[1], sys.argv[2], int(sys.argv[3]), 65536
r = random.Random(5)
qemu_io = ["qemu-io", "-f", "qcow2", "--cache=unsafe", "-d", "unmap", image]
subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(clusters * size)], check=True)
# Hexadecimal digits: compressed, each is half as long.
contents = [r.randbytes(n).hex().encode().ljust(size, b"0") for n in (20000, 24000, 28000, 32768)]
for n, data in enumerate(contents):
    with open(f"{image}.{n}", "wb") as out:
        out.write(data)
what = {c: r.randrange(4) for c in r.sample(range(clusters), clusters)}
writes = "".join(f"write -q -c -s {image}.{n} {c * size} {size}\n" for c, n in what.items())
subprocess.run(qemu_io, input=writes.encode(), check=True, stdout=subprocess.DEVNULL)
gone = set(r.sample(range(clusters), clusters // 2))
trims = "".join(f"discard -q {c * size} {size}\n" for c in gone)
subprocess.run(qemu_io, input=trims.encode(), check=True, stdout=subprocess.DEVNULL)
with open(model, "wb") as out:
    for c in range(clusters):
        out.write(bytes(size) if c in gone else contents[what[c]])
for n in range(4):
    os.unlink(f"{image}.{n}")
END
    cp "$image" "$W/before"
    for limit in '' --max-rate=1G; do
        cp "$W/before" "$image"
        start_server "$image"
        compact $limit
        [ $(($(allocated "$image") * 100)) -le $(($(allocated "$W/before") * 65)) ] || fail "the host has $(allocated "$image") of $(allocated "$W/before")"
        short=$(length "$image")
        compact $limit
        [ "$(length "$image")" -le "$short" ] || fail "compacted again, it has grown from $short to $(length "$image") bytes"
        stop_server
        packed "$image" 110
        lengths+=("$short")
        judge "$image" "$W/model"
    done
    say "$(length "$W/before") bytes became ${lengths[*]}"
    [ $((lengths[0] * 100)) -le $((lengths[1] * 102)) ] || fail "longer than piece by piece: ${lengths[*]}"
    [ $((lengths[0] * 100)) -le $(($(length "$W/before") * 60)) ] || fail "hardly shorter: ${lengths[*]}"
}

type=${1:?zlib, zstd, damaged, narrow or scattered}
case $type in
scattered) scattered ;;
damaged) damaged ;;
narrow) narrow ;;
zlib)
    reads
    one 512 16 6
    one 4096 1 12
    one 65536 16 24 0.10
    one 65536 2 24
    one 262144 64 24
    ;;
zstd)
    reads
    one 1024 4 8
    one 16384 8 24
    one 65536 16 32
    one 65536 1 24
    one 2097152 32 32
    ;;
esac
