#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# Usage: bloated.sh [MIB]. A disk of which MIB (512) were written in random order and half of that trimmed: after
# `qlean compact` the file is at most 1.01 x as long as what `qemu-img convert` makes, holds the same bytes, and on the
# way never took more than 1 % more of the host's disk than before.
. "$(dirname "$0")/../lib.sh"
mib=${1:-512}
image=$W/disk.qcow2
create "$image" $((mib * 2))M
start_server --reclaim "$image"
nbdsh_do "$URI" "
import random
r = random.Random(5)
order = list(range($mib * 32)); r.shuffle(order)  # every second cluster of the disk, and then some
noise = r.randbytes(65536 + 4096)
order = order[:$mib * 16]
for n in order:
    at = n % 4096
    h.pwrite(n.to_bytes(8, 'big') + noise[at:at + 65528], n << 16)
r.shuffle(order)
for n in order[::2]: h.trim(65536, n << 16)
h.flush()
"
nbdcopy "$URI" "$W/model"
# all of it punched: half of the data, and 1 % for metadata. Anything still to come would hide what compaction takes
settled() { [ "$(allocated "$image")" -le $((mib * 512 * 1024 * 101 / 100)) ]; }
eventually 15 settled || fail "trimmed clusters still take space: $(allocated "$image") bytes allocated"
space=$(allocated "$image")
long=$(length "$image")
[ "$long" -ge $((mib * 1024 * 1024)) ] || fail "the image is not bloated: $long bytes"

"$PYTHON" - "$image" "$W/stop" >"$W/peak" <<'END' &
import os, sys, time
peak = longest = samples = 0
while not os.path.exists(sys.argv[2]):
    s = os.stat(sys.argv[1])
    peak, longest, samples = max(peak, s.st_blocks * 512), max(longest, s.st_size), samples + 1
    time.sleep(0.002)
print(peak, longest, samples)
END
sampler=$!
[ "$(status .compact.most_by_request)" = 33554432 ] || fail "no long ranges are asked for: $(status .compact)"
started=$(date +%s%N)
compact_kindly
took=$((($(date +%s%N) - started) / 1000000))
touch "$W/stop"
wait $sampler
read -r peak longest samples <"$W/peak"
say "compacted in $took ms; allocated before $space, at most $peak, after $(allocated "$image") ($samples samples)"
[ "$samples" -ge 10 ] || fail "only $samples samples of the allocation"
[ "$peak" -le $((space * 101 / 100)) ] || fail "took $((peak - space)) bytes of extra space"
[ "$longest" -le "$long" ] || fail "the file grew on the way, from $long to $longest bytes"
stop_server
judge "$image" "$W/model"
lean "$image" 101
