#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# `qlean resize` grows the disk of an image that is in use: connections that are open go on with the size they know, new
# ones see the new size, what is new reads as zeroes, whatever lay beyond the end before. Snapshots and bitmaps keep
# what they have; shrinking is refused, and QEMU agrees with the result.
. "$(dirname "$0")/../lib.sh"
need qemu-img qemu-io qemu-nbd nbdinfo jq

M=$((1 << 20))
resize() { "$QLEAN" resize "$@" >"$W/qlean.log" 2>&1 || fail "qlean resize $*: $(cat "$W/qlean.log")"; }
not_resized() { # PATTERN ARGUMENTS
    local pattern=$1
    shift
    if "$QLEAN" resize "$@" >"$W/qlean.log" 2>&1; then fail "qlean resize $* succeeded"; fi
    grep -q -- "$pattern" "$W/qlean.log" || fail "the sentence does not say '$pattern': $(cat "$W/qlean.log")"
    echo "  $(tail -n 1 "$W/qlean.log")"
}
size_of() { qemu-img info -U --output=json "$1" | jq '."virtual-size"'; }
expect_size() { [ "$(size_of "$1")" = "$2" ] || fail "$1 has $(size_of "$1") bytes, not $2"; }

say "under a guest that works, with and without the filter"
for mode in --reclaim ''; do
    for cluster in 64k 4k; do
        image=$W/live.qcow2
        rm -f "$image" "$W/model"
        create -o cluster_size=$cluster "$image" 64M
        # shellcheck disable=SC2086
        start_server $mode "$image"
        guest_beside --model "$W/model" --largest 262144 --connections 2
        resize "$SOCK" 200M
        [ "$(nbdinfo --size "$URI")" = $((200 * M)) ] || fail "a new connection sees $(nbdinfo --size "$URI") bytes"
        resize "$SOCK" +56M
        sleep 0.5
        guest_end
        nbdsh_do "$URI" "
assert h.get_size() == $((256 * M))
assert h.pread($M, 100 * $M) == bytes($M)
h.pwrite(b'n' * 70000, $((256 * M)) - 70000); h.flush()"
        truncate -s 256M "$W/model"
        "$PYTHON" -c "
with open('$W/model', 'r+b') as f: f.seek($((256 * M)) - 70000); f.write(b'n' * 70000)"
        compact
        stop_server
        judge "$image" "$W/model"
        expect_size "$image" $((256 * M))
    done
done

say "maintenance that was under way says why it ends; the next one works"
create "$W/busy.qcow2" 64M
start_server "$W/busy.qcow2"
nbdsh_do "$URI" 'h.pwrite(b"x" * (8 << 20), 32 << 20); h.trim(4 << 20, 32 << 20)'
cat >"$W/busy.py" <<END
import subprocess
assert h.get_size() == 64 << 20
subprocess.run(["$QLEAN", "resize", "$SOCK", "1G"], check=True, stdout=subprocess.DEVNULL)
for what in (lambda: h.cache(1 << 20, 0), h.flush):
    try:
        what()
    except nbd.Error as e:
        assert e.errno == "EPERM", e
    else:
        raise SystemExit("an operation goes on after a resize")
END
nbdsh_do "$(export_uri compact)" "$(cat "$W/busy.py")"
status .last_error | grep -q 'the image was resized; reconnect' || fail "no sentence: $(status .last_error)"
compact
stop_server
judge "$W/busy.qcow2"
expect_size "$W/busy.qcow2" $((1024 * M))

say "whoever owns compact is not kept waiting, nor interrupted by what is refused"
start_server "$W/busy.qcow2"
cat >"$W/owner.py" <<END
import subprocess
def resize(size): return subprocess.run(["$QLEAN", "resize", "$SOCK", size], stderr=subprocess.PIPE, text=True)
h.flush() # it is ours now
r = resize("2G")
assert r.returncode == 4 and "running 'compact'" in r.stderr, r
r = subprocess.run(["$QLEAN", "check", "$SOCK"], stderr=subprocess.PIPE, text=True)
assert r.returncode == 1 and "running 'compact'" in r.stderr and len(r.stderr.splitlines()) == 1, r
h.cache(1 << 20, 0); h.flush()
END
nbdsh_do "$(export_uri compact)" "$(cat "$W/owner.py")"
cat >"$W/refused.py" <<END
import subprocess
for size in "512M", "2000000001": # smaller; not a multiple of 512
    r = subprocess.run(["$QLEAN", "resize", "$SOCK", size], stderr=subprocess.PIPE, text=True)
    assert r.returncode == 1, r
h.cache(1 << 20, 0); h.flush()
END
nbdsh_do "$(export_uri zeroes)" "$(cat "$W/refused.py")"
stop_server

say "what is in flight is told why it ends; lists and status work all the time"
create -o cluster_size=512 "$W/flight.qcow2" 96M
qemu-io -f qcow2 -c 'write -P 1 0 96M' "$W/flight.qcow2" >/dev/null
qemu-img snapshot -c one "$W/flight.qcow2"
start_server "$W/flight.qcow2"
cat >"$W/beside.py" <<END
import nbd, os
while not os.path.exists("$W/beside-stop"):
    for export in "status", "":
        h, names = nbd.NBD(), []
        h.set_opt_mode(True)
        h.connect_uri("$URI")
        h.opt_list(lambda name, _: names.append(name))
        assert "snapshot/one" in names, names
        h.set_export_name(export)
        h.opt_go()
        h.pread(4096, 0)
        h.shutdown()
END
run_pid "$W/beside.log" "$PYTHON" "$W/beside.py"
beside=$PID
cat >"$W/flight.py" <<END
import subprocess
told = 0
for i in range(20):
    z = nbd.NBD()
    z.connect_uri("$(export_uri zeroes)")
    cookie = z.aio_cache(96 << 20, 0)
    subprocess.run(["$QLEAN", "resize", "$SOCK", "+1M"], check=True, stdout=subprocess.DEVNULL)
    try:
        while not z.aio_command_completed(cookie): z.poll(-1)
    except nbd.Error as e:
        assert e.errno == "EPERM", e
        told += 1
assert told > 0, "nothing was in flight"
END
nbdsh_do "$URI" "$(cat "$W/flight.py")"
touch "$W/beside-stop"
wait "$beside" || fail "beside resizes: $(tail -n 5 "$W/beside.log")"
grep -q 'is being resized; reconnect' "$W/server$SERVERS.log" || fail "nobody was told: $(tail -n 3 "$W/server$SERVERS.log")"
! grep -q 'stopped on request' "$W/server$SERVERS.log" || fail "somebody was told that the server stops"
stop_server
judge "$W/flight.qcow2"

say "refusals leave everything as it is"
start_server "$W/busy.qcow2"
not_resized 'cut off what is in use' "$SOCK" 512M
not_resized 'multiple of 512' "$SOCK" 2000000001
not_resized '32 MiB' "$SOCK" 8000000T
[ "$(nbdinfo --size "$URI")" = $((1024 * M)) ]
stop_server
start_server "$W/busy.qcow2" -r
not_resized 'read-only' "$SOCK" 2G
stop_server
judge "$W/busy.qcow2"

say "an image file, and an L1 table that outgrows what is covered by refcount blocks"
create -o cluster_size=512 "$W/small.qcow2" 64M
qemu-io -f qcow2 -c 'write -P 7 63M 1M' "$W/small.qcow2" >/dev/null
resize "$W/small.qcow2" 40G
expect_size "$W/small.qcow2" $((40 * 1024 * M))
judge "$W/small.qcow2"
qemu-io -f qcow2 -c 'read -P 7 63M 1M' -c 'read -P 0 64M 64M' -c 'write -P 9 39G 64k' "$W/small.qcow2" >"$W/io.txt"
! grep -q 'verification failed' "$W/io.txt" || fail "other bytes: $(cat "$W/io.txt")"
judge "$W/small.qcow2"
create -o compat=0.10 "$W/v2.qcow2" 1M
resize "$W/v2.qcow2" +1T
expect_size "$W/v2.qcow2" $(((1 << 40) + M))
judge "$W/v2.qcow2"

say "what was left beyond the end does not show"
create "$W/tail.qcow2" 64M
qemu-io -f qcow2 -c 'write -P 5 0 64M' "$W/tail.qcow2" >/dev/null
qemu-img resize -q --shrink "$W/tail.qcow2" $((33 * M + 512))
resize "$W/tail.qcow2" 64M
{ head -c $((33 * M + 512)) /dev/zero | tr '\0' '\5'; head -c $((31 * M - 512)) /dev/zero; } >"$W/model"
judge "$W/tail.qcow2" "$W/model"

say "over a longer backing file the new area reads as zeroes"
head -c 48M /dev/urandom >"$W/backing.raw"
for compat in 1.1 0.10; do
    create -o compat=$compat -b "$W/backing.raw" -F raw "$W/over.qcow2" $((16 * M + 1536))
    qemu-io -f qcow2 -c 'write -P 3 16M 1k' "$W/over.qcow2" >/dev/null
    qemu-img convert -f qcow2 -O raw "$W/over.qcow2" "$W/model"
    resize "$W/over.qcow2" 80M
    truncate -s 80M "$W/model"
    judge "$W/over.qcow2" "$W/model"
done

say "an external data file grows too"
for raw in off on; do
    create -o data_file="$W/data-$raw.bin",data_file_raw=$raw "$W/external-$raw.qcow2" 16M
    qemu-io -f qcow2 -c 'write -P 4 0 16M' "$W/external-$raw.qcow2" >/dev/null
    head -c 1M /dev/urandom >>"$W/data-$raw.bin"
    resize "$W/external-$raw.qcow2" 64M
    { head -c 16M /dev/zero | tr '\0' '\4'; head -c 48M /dev/zero; } >"$W/model"
    judge "$W/external-$raw.qcow2" "$W/model"
    [ $raw = off ] || cmp "$W/data-$raw.bin" "$W/model" || fail "the raw data file is not the disk"
done

say "snapshots keep their size"
create "$W/snap.qcow2" 16M
qemu-io -f qcow2 -c 'write -P 1 0 16M' "$W/snap.qcow2" >/dev/null
qemu-img snapshot -c one "$W/snap.qcow2"
qemu-io -f qcow2 -c 'write -P 2 0 1M' "$W/snap.qcow2" >/dev/null
resize "$W/snap.qcow2" 1G
judge "$W/snap.qcow2"
qemu-img convert -f qcow2 -l snapshot.name=one -O raw "$W/snap.qcow2" "$W/one.raw"
# QEMU shows it in the size that the disk has now; over the export it has its own.
head -c $((16 * M)) /dev/zero | tr '\0' '\1' | cmp -n $((16 * M)) - "$W/one.raw" || fail "the snapshot is another"
start_server "$W/snap.qcow2"
[ "$(nbdinfo --size "$(export_uri snapshot/one)")" = $((16 * M)) ] || fail "the snapshot has another size"
stop_server
create -o compat=0.10 "$W/snap2.qcow2" 16M
qemu-img snapshot -c one "$W/snap2.qcow2"
not_resized 'version 2' "$W/snap2.qcow2" 1G
! qemu-img resize -q "$W/snap2.qcow2" 1G 2>/dev/null || fail "QEMU resizes what we do not"

say "bitmaps grow with the disk"
image=$W/bitmaps.qcow2
create -o cluster_size=4k "$image" 32M
qemu-img bitmap --add -g 512 "$image" on
qemu-img bitmap --add -g 512 "$image" off
qemu-io -f qcow2 -c 'write 1M 4k' "$image" >/dev/null
qemu-img bitmap --disable "$image" off
start_server "$image"
nbdsh_do "$URI" 'h.pwrite(b"a" * 512, 5 << 20)'
resize "$SOCK" 256M
nbdsh_do "$URI" 'h.pwrite(b"b" * 1024, 200 << 20)'
stop_server
judge "$image"
bits() {
    rm -f "$W/qemu.sock"
    run_pid "$W/qemu-nbd.log" qemu-nbd -r -f qcow2 -B "$1" -k "$W/qemu.sock" "$image"
    eventually 10 test -S "$W/qemu.sock" || fail "qemu-nbd does not export $1: $(tail -n 2 "$W/qemu-nbd.log")"
    nbdinfo --json --map="qemu:dirty-bitmap:$1" "nbd+unix:///?socket=$W/qemu.sock" |
        jq -c '[.[] | select(.type == 1) | [.offset, .length]]'
    gone "$PID" || fail "qemu-nbd does not end"
}
[ "$(bits on)" = "[[$M,4096],[$((5 * M)),512],[$((200 * M)),1024]]" ] || fail "the enabled bitmap has $(bits on)"
[ "$(bits off)" = "[[$M,4096]]" ] || fail "the disabled bitmap has $(bits off)"
start_server "$image"
nbdsh_do "$URI" 'h.pwrite(b"a" * 512, 6 << 20)'
kill_server
not_resized 'inconsistent' "$image" 1G
expect_size "$image" $((256 * M))
judge_killed "$image"
