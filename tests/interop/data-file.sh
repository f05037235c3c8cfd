#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# Usage: data-file.sh off|raw|refused. Images whose data is in a file of its own (raw: which is the guest's disk, byte for
# byte): served, trimmed, zeroed, compacted beside the guest, killed, judged, written by QEMU and served again. What
# cannot be the data file is refused with one sentence.
. "$(dirname "$0")/../lib.sh"
need qemu-img qemu-io jq
mode=${1:?off, raw or refused}

# same IMAGE DATA: clean, the model's bytes by QEMU's eyes, and raw data is the model itself
same() {
    judge "$1" "$W/model"
    # (QEMU makes it as long as whole clusters.)
    [ $mode != raw ] || cmp -n "$(length "$W/model")" "$2" "$W/model" || fail "the raw data file is not the guest's disk"
}

if [ $mode = refused ]; then
    image=$W/disk.qcow2 data=$W/disk.data
    create -o data_file="$data",data_file_raw=on "$image" 1M
    reads='assert h.pread(1 << 20, 0) == bytes(1 << 20)'
    mv "$data" "$data.away"
    refused "$image" 'cannot be found.*data-file='
    start_server "$image" data-file="$data.away" # wherever it is now
    nbdsh_do "$URI" "$reads"
    status .data_file
    stop_server
    mkdir "$data"
    refused "$image" 'not a regular file'
    rmdir "$data"
    ln -s "$image" "$data"
    refused "$image" 'itself'
    rm "$data"
    head -c 1000000 /dev/zero >"$data"
    refused "$image" 'truncated.*1048576 bytes, but has 1000000'
    mv "$data.away" "$data"

    # QEMU's locks: both sides see each other, also where only the data file is shared
    cp "$image" "$W/other.qcow2"
    start_server "$image"
    image=$W/other.qcow2
    expect_failure 'a second writer of the data file' qemu-io -f qcow2 -c 'write 0 64k' "$image"
    refused "$image" 'disk.data.* in use by another process'
    stop_server
    run_pid "$W/qemu-nbd.log" qemu-nbd -t -k "$W/q" -f qcow2 "$W/disk.qcow2"
    eventually 10 test -S "$W/q" || fail "qemu-nbd did not start"
    refused "$image" 'disk.data.* in use by another process'
    end_pid "$PID"

    # Relative names: QEMU's from the current directory, everybody else's from the image's
    mkdir "$W/a" "$W/b"
    (cd "$W/a" && create -o data_file=x.data rel.qcow2 1M && qemu-io -f qcow2 -c 'write -P 7 0 1M' rel.qcow2 >/dev/null)
    image=$W/a/rel.qcow2
    reads='assert h.pread(1 << 20, 0) == b"\7" * (1 << 20)'
    start_server "$image"
    nbdsh_do "$URI" "$reads"
    stop_server
    mv "$W/a/x.data" "$W/b"
    refused "$image" 'neither beside the image nor in the current directory'
    cd "$W/b"
    start_server "$image"
    nbdsh_do "$URI" "$reads"
    stop_server
    cp x.data "$W/a"
    refused "$image" 'beside the image, and another in the current directory.*data-file='
    start_server "$image" data-file=x.data
    nbdsh_do "$URI" "$reads"
    stop_server
    exit
fi

option=off
[ $mode = off ] || option=on
size=$(((24 << 20) + 12800)) # no multiple of a cluster
for cluster in 512 4k 64k 2M 64k,extended_l2=on; do
    image=$W/$cluster.qcow2 data=$W/${cluster%,*}.data
    rm -f "$data"
    create -o "data_file=$data,data_file_raw=$option,cluster_size=$cluster" "$image" $size
    rm -f "$W/model"
    made=$(length "$data")
    start_server --reclaim "$image"
    busy "$cluster" 300 --largest 262144
    nbdinfo --map "$(export_uri compact)" >"$W/map.txt"
    ! grep -vq hole "$W/map.txt" || fail "$cluster: something is left to move: $(cat "$W/map.txt")"
    [ "$(status .data_file.raw)" = $([ $mode = raw ] && echo true || echo false) ] || fail "status: $(status .data_file)"
    stop_server
    same "$image" "$data"
    [ "$(length "$data")" = "$made" ] || fail "$cluster: the data file was $made bytes long, and is $(length "$data")"
    qemu-img info "$image" | grep -q "data file raw: $([ $mode = raw ] && echo true || echo false)" || fail "$cluster: the raw bit changed"

    # QEMU writes again; then a disk of zeroes is given back to the host
    qemu-io -f qcow2 -c 'write -P 77 1234944 100352' -c 'discard 4M 4M' -c 'write -z 9M 1M' -c 'write -zu 11M 1M' "$image" >/dev/null
    again "$image" "$cluster" 100 --largest 262144
    same "$image" "$data"
    before=$(allocated "$data")
    start_server "$image"
    nbdsh_do "$URI" '
for at in range(0, h.get_size(), 1 << 20): h.pwrite(bytes(min(1 << 20, h.get_size() - at)), at)
h.flush()'
    compact
    stop_server
    truncate -s 0 "$W/model"
    truncate -s $size "$W/model"
    same "$image" "$data"
    truncate -s $size "$data" # QEMU writes whole clusters, also beyond the end of the disk
    # (Clusters below the host's block size are punched one by one, which frees nothing.)
    [ $cluster = 512 ] || [ "$(allocated "$data")" -lt 65536 ] || fail "$cluster: $(allocated "$data") of $before bytes are left of a disk of zeroes"
done

# What a flush has acknowledged is there after a kill.
say 'kills'
image=$W/kill.qcow2 data=$W/kill.data
create -o "data_file=$data,data_file_raw=$option" "$image" 24M
rm -f "$W/model"
start_server "$image"
for n in 1 2 3 4 5; do
    guest --model "$W/model" --requests 60 --largest 262144 >"$W/guest.log" 2>&1 || fail "kill: $(cat "$W/guest.log")"
    nbdsh_do "$URI" 'h.flush()'
    kill_server
    judge_killed "$image"
    same_bytes "$image" "$W/model"
    start_server "$image"
done
compact
stop_server
same "$image" "$data"

say 'read-only, preallocated, over a backing file'
start_server "$image" -r
nbdcopy "$URI" "$W/copy"
cmp "$W/copy" "$W/model"
stop_server
if [ $mode = off ]; then
    for how in metadata falloc full; do
        create -o "data_file=$W/p.data,preallocation=$how" "$W/p.qcow2" 8M
        rm -f "$W/model"
        start_server "$W/p.qcow2"
        guest --model "$W/model" --requests 100 >"$W/guest.log" 2>&1 || fail "$how: $(cat "$W/guest.log")"
        compact
        stop_server
        same "$W/p.qcow2" "$W/p.data"
    done
    random_file "$W/base.raw" $((9 << 20))
    create -b base.raw -F raw -o "data_file=$W/o.data" "$W/o.qcow2" 12M
    create -b o.qcow2 -F qcow2 "$W/top.qcow2" # over an image with a data file
    cp "$W/base.raw" "$W/model"
    truncate -s 12M "$W/model"
    for image in o top; do
        start_server "$W/$image.qcow2"
        guest --model "$W/model" --requests 300 >"$W/guest.log" 2>&1 || fail "$image: $(cat "$W/guest.log")"
        compact
        stop_server
        judge "$W/$image.qcow2" "$W/model"
    done
fi
