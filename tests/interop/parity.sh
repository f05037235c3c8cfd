#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# Copying a disk in and out: `qemu-img convert` into the server makes an image equal to its source, and not longer than a
# converted one; nbdcopy in and out, qemu-img map and compare through the server agree with it.
. "$(dirname "$0")/../lib.sh"
need qemu-img nbdcopy
"$PYTHON" - "$W/source" <<'END'
import random, sys
r = random.Random(6)
with open(sys.argv[1], "wb") as f:
    f.truncate((96 << 20) + 512)  # no multiple of a cluster
    for _ in range(300):  # data, holes and zeroes of any size
        f.seek(r.randrange(96 << 20) & ~511)
        f.write(r.choice((r.randbytes, bytes))(min(r.randint(1, 400000), 1 << 20)))
    f.truncate((96 << 20) + 512)
END
size=$(length "$W/source")
for cluster in 4k 64k 1M; do
    for how in convert unaligned nbdcopy; do
        image=$W/$how-$cluster.qcow2
        create -o cluster_size=$cluster "$image" "$size"
        start_server "$image"
        case $how in
        convert) qemu-img convert -n -f raw -O raw "$W/source" "$URI" ;;
        unaligned) qemu-img convert -n -S 512 -W -m 8 -f raw -O raw "$W/source" "$URI" ;;
        nbdcopy) nbdcopy --flush --destination-is-zero "$W/source" "$URI" ;;
        esac
        qemu-img compare -f raw -F raw "$W/source" "$URI" >"$W/compare.txt" || fail "$how: $(cat "$W/compare.txt")"
        nbdcopy "$URI" "$W/out"
        cmp "$W/source" "$W/out"
        rm "$W/out"
        qemu-img convert -f raw -O raw "$URI" "$W/out"
        cmp "$W/source" "$W/out"
        rm "$W/out"
        stop_server
        judge "$image" "$W/source"
        [ $how = nbdcopy ] || lean "$image" 101
    done
done
