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

# What a copy of a block device is: the file goes on behind all that the image holds, for much more than what one refcount
# block describes. A guest is at work on it.
create "$W/device.qcow2" 10G
qemu-io -c "write -P 5 0 32M" "$W/device.qcow2" >/dev/null
truncate -s +300G "$W/device.qcow2"
cp --sparse=always "$W/device.qcow2" "$W/file.qcow2" # and of one without a guest
start_server "$W/device.qcow2"
nbdsh_do "$URI" '
for n in range(64): h.pwrite(bytes([n + 1]) * 65536, (1 << 30) + n * 131072)
h.flush()'
"$QLEAN" compact --no-zeroes "$SOCK" >/dev/null
nbdsh_do "$URI" '
assert h.pread(32 << 20, 0) == b"\5" * (32 << 20)
for n in range(64): assert h.pread(65536, (1 << 30) + n * 131072) == bytes([n + 1]) * 65536, n'
stop_server
"$QLEAN" compact --no-zeroes "$W/file.qcow2" >/dev/null
for image in device file; do
    judge "$W/$image.qcow2"
    say "$image: 300 GiB more than it holds, now $(length "$W/$image.qcow2")"
    [ "$(length "$W/$image.qcow2")" -lt $((48 << 20)) ] || fail "$image.qcow2 was not cut: $(length "$W/$image.qcow2")"
done
