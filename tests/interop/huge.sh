#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# Nothing at open grows with the image: an 8 TiB disk is served as fast as one of 1 GiB, used at its very end, and
# compacted.
. "$(dirname "$0")/../lib.sh"

# open_ms IMAGE: milliseconds from the start of nbdkit to the first byte read, best of five
open_ms() {
    local best=100000 t _
    for _ in 1 2 3 4 5; do
        t=$(date +%s%N)
        nbdkit -U - "$PLUGIN" file="$1" --run 'qemu-io -r -f raw -c "read 0 512" "$uri"' >/dev/null
        t=$((($(date +%s%N) - t) / 1000000))
        [ $t -ge $best ] || best=$t
    done
    echo $best
}

create "$W/small.qcow2" 1G
create "$W/huge.qcow2" 8T
# an L2 table for each of 2000 places all over the disk
qemu-nbd -t -k "$W/q" -f qcow2 --discard=unmap "$W/huge.qcow2" &
PIDS+=($!)
filler=$!
eventually 10 test -S "$W/q"
nbdsh_do "nbd+unix:///?socket=$W/q" '
for n in range(2000): h.pwrite(n.to_bytes(8, "big") * 64, n * (4 << 30))
h.flush()'
kill $filler
wait $filler || true
small=$(open_ms "$W/small.qcow2")
huge=$(open_ms "$W/huge.qcow2")
say "first byte of 1 GiB after $small ms, of 8 TiB after $huge ms (with the start of nbdkit and qemu-io)"
[ "$huge" -le $((small + 50)) ] || fail "opening 8 TiB takes $((huge - small)) ms more than 1 GiB"

start_server --reclaim "$W/huge.qcow2"
nbdsh_do "$URI" '
end = h.get_size()
assert end == 8 << 40, end
h.pwrite(b"the end", end - 7)
for n in range(0, 2000, 2): h.trim(65536, n * (4 << 30))
h.trim((4 << 30) - 512, end // 2 - 123)
h.flush()
assert h.pread(7, end - 7) == b"the end"'
rss=$(awk '/VmHWM/ {print $2}' "/proc/$SERVER/status")
compact_kindly
nbdsh_do "$URI" '
for n in range(1, 2000, 2): assert h.pread(512, n * (4 << 30)) == n.to_bytes(8, "big") * 64, n
for n in range(0, 2000, 2): assert h.pread(512, n * (4 << 30)) == bytes(512), n'
stop_server
say "server's memory before compaction: $rss KiB, file length $(length "$W/huge.qcow2")"
judge "$W/huge.qcow2"
[ "$rss" -le 262144 ] || fail "serving 8 TiB took $rss KiB of memory"
