#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# Usage: subcluster-discard.sh plain|reclaim. Discards and zeroes smaller than a cluster give their space back: seen in
# the host's allocation of an image whose 1 MiB clusters are discarded in 4 KiB pieces, in random order.
. "$(dirname "$0")/../lib.sh"
mode=${1:?plain or reclaim}
mib=$((1024 * 1024))

# pieces MIB-LIST-EXPRESSION PER-MIB VERB: the 4 KiB pieces to give up, shuffled
pieces() {
    nbdsh_do "$URI" "
import random
todo = [(m << 20) + (i << 12) for m in $1 for i in range(256) if i < $2]
random.Random(3).shuffle(todo)
for n, offset in enumerate(todo):
    if '$3' == 'trim': h.trim(4096, offset)
    elif '$3' == 'zero': h.zero(4096, offset)
    else: h.pwrite(bytes(4096), offset)
h.flush()"
}

fill() {
    create -o cluster_size=1M "$W/$1.qcow2" 64M
    if [ "$mode" = reclaim ]; then start_server --reclaim "$W/$1.qcow2"; else start_server "$W/$1.qcow2"; fi
    random_file "$W/model" 64M
    nbdcopy --flush "$W/model" "$URI"
    [ "$(allocated "$W/$1.qcow2")" -ge $((64 * mib)) ] || fail "the image is not full"
}

below() { [ "$(allocated "$1")" -le "$2" ]; }

# gives_back NAME BYTES: the host's allocation comes down to what is left, plus 5 clusters of metadata (header, L1 table,
# L2 table, refcount table and block)
gives_back() {
    eventually 15 below "$W/$1.qcow2" $(($2 + 5 * mib)) ||
        fail "$1: $(allocated "$W/$1.qcow2") bytes allocated, $2 in use"
    say "$1: $(allocated "$W/$1.qcow2") bytes allocated, $2 in use"
}

# has_holes BYTES: at least so many bytes of the disk are holes in the map that the server shows
has_holes() {
    local holes
    holes=$(nbdinfo --map --json "$URI" | jq '[.[] | select(.type % 2 == 1) | .length] | add // 0')
    [ "$holes" -ge "$1" ]
}

for verb in trim zero; do
    fill "whole-$verb" # 47 clusters, each discarded piece by piece until nothing is left of it
    pieces 'range(3, 50)' 256 $verb
    gives_back "whole-$verb" $((17 * mib))
    nbdcopy "$URI" "$W/raw"
    if [ "$mode" = reclaim ]; then # freed, not merely punched: the guest's map shows holes
        eventually 15 has_holes $((47 * mib)) || fail "the filter did not give the clusters back"
    fi
    compact
    lean "$W/whole-$verb.qcow2" 101
    stop_server
    judge "$W/whole-$verb.qcow2" "$W/raw"

    fill "part-$verb" # 188 of 256 pieces of every cluster: none adds up, the space comes back all the same
    pieces 'range(64)' 188 $verb
    gives_back "part-$verb" $((17 * mib))
    nbdcopy "$URI" "$W/raw"
    stop_server
    judge "$W/part-$verb.qcow2" "$W/raw"
done

if [ "$mode" = reclaim ]; then
    fill zero-payloads # a guest that writes zeroes never allowed a hole: given back on request, which compact makes
    pieces 'range(3, 50)' 256 payload
    compact
    status .reclaim.given_back_bytes | grep -qx $((47 * mib)) || fail "the filter gave back other than 47 MiB: $(status .reclaim)"
    gives_back zero-payloads $((17 * mib))
    nbdcopy "$URI" "$W/raw"
    stop_server
    judge "$W/zero-payloads.qcow2" "$W/raw"
fi
