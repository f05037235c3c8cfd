#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# TRIM of any offset and length succeeds, and touches nothing outside its range; what is trimmed reads as zeroes or
# as before. With 4 KiB, 64 KiB and 2 MiB clusters, with and without the filter.
. "$(dirname "$0")/../lib.sh"

cat >"$W/trims.py" <<'END'
import random
size = h.get_size()
data = bytearray(random.Random(1).randbytes(size))
for at in range(0, size, 1 << 20):
    h.pwrite(bytes(data[at:at + (1 << 20)]), at)
ranges = [(0, 1), (0, 511), (1, 1), (511, 2), (4095, 4098), (65535, 65538), (65536, 65536), (1, 65536),
          (131071, 3), (size - 1, 1), (size - 65537, 65537), (1 << 21, 1 << 21), ((1 << 21) - 1, (1 << 21) + 2),
          (3 << 20, 999999), (size // 2 + 77, size // 4)]
r = random.Random(2)
ranges += [(o, r.randint(1, size - o)) for o in (r.randrange(size) for _ in range(20))][:20]
for offset, length in ranges:
    length = min(length, size - offset)
    before = bytes(data[offset:offset + length])
    h.trim(length, offset)
    for at in range(0, size, 1 << 20):
        got = h.pread(min(1 << 20, size - at), at)
        lo, hi = max(at, offset), min(at + len(got), offset + length)
        if lo < hi:
            part = got[lo - at:hi - at]
            old = before[lo - offset:hi - offset]
            if part != old and part.count(0) != len(part):
                assert all(a in (0, b) for a, b in zip(part, old)), f"trim {offset}+{length} left something else"
            data[lo:hi] = part
        assert got == data[at:at + len(got)], f"trim {offset}+{length} changed bytes outside its range"
    if r.random() < 0.5:  # fill again, so that there is always something to trim
        data[offset:offset + length] = before
        for at in range(offset, offset + length, 1 << 20):
            n = min(1 << 20, offset + length - at)
            h.pwrite(before[at - offset:at - offset + n], at)
h.flush()
END
for mode in --reclaim ''; do
    for cluster in 4k 64k 2M; do
        image=$W/$cluster.qcow2
        create -o cluster_size=$cluster "$image" 12345856 # no multiple of a cluster
        # shellcheck disable=SC2086
        start_server $mode "$image"
        nbdsh_do "$URI" "$(cat "$W/trims.py")"
        nbdcopy "$URI" "$W/raw"
        stop_server
        judge "$image" "$W/raw"
    done
done
