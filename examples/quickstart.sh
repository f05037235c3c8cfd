#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# From nothing to a lean image, on a bare Debian 12: installs, builds, ages a QCOW2 image with a real ext4 on it, and
# compacts it while a writer keeps writing. It leaves nothing behind but the packages and build/.
set -euo pipefail
cd "$(dirname "$0")/.."
step() { echo; echo "== $*"; }

step "Installing what is missing and building (build/)"
examples/install-deps.sh build try
[ -f build/build.ninja ] || meson setup build >/dev/null
ninja -C build -j "$(nproc)" plugin/nbdkit-qcow2-plugin.so filter/nbdkit-reclaim-filter.so client/qlean | tail -n 1
qlean=$PWD/build/client/qlean

# The path of the socket stands in URIs, and has at most 107 characters.
[[ ${TMPDIR:-/tmp} =~ ^/[A-Za-z0-9/._-]{1,60}$ ]] || export TMPDIR=/tmp
work=$(mktemp -d "${TMPDIR:-/tmp}/qlean-quickstart.XXXXXX")
image=$work/disk.qcow2 socket=$work/sock mnt=$work/mnt
server='' fuse='' loop='' writer=''
clean_up() {
    set +e
    [ -z "$writer" ] || { touch "$work/stop"; wait "$writer"; }
    mountpoint -q "$mnt" && umount "$mnt"
    [ -z "$loop" ] || losetup -d "$loop"
    mountpoint -q "$work/fuse" && umount -l "$work/fuse"
    [ -z "$fuse" ] || kill "$fuse"
    [ -z "$server" ] || kill "$server"
    wait
    rm -rf --one-file-system "$work"
} 2>/dev/null
trap clean_up EXIT
trap 'exit 130' INT TERM
wait_for() { local _; for _ in $(seq 400); do "$@" >/dev/null 2>&1 && return; sleep 0.025; done; echo "waited in vain: $*" >&2; exit 1; }
size() { echo "length $(stat -c %s "$image" | numfmt --to=iec-i), on the host's disk $(($(stat -c %b "$image") * 512 / 1024 / 1024)) MiB"; }

step "Serving a new 2 GiB image: nbdkit with the qcow2 plugin, a Unix socket"
qemu-img create -q -f qcow2 "$image" 2G
nbdkit -f -P "$work/pid" -U "$socket" --filter=build/filter/nbdkit-reclaim-filter.so \
    build/plugin/nbdkit-qcow2-plugin.so file="$image" &
server=$!
wait_for test -s "$work/pid"

mkdir "$mnt" "$work/fuse"
mount_disk() { # the disk as a file (nbdfuse), as a block device (loop), as a file system
    [ "$(id -u)" = 0 ] && [ -e /dev/fuse ] && [ -e /dev/loop-control ] || return 1
    nbdfuse "$work/fuse/" "nbd+unix:///?socket=$socket" 2>/dev/null &
    fuse=$!
    wait_for test -s "$work/fuse/nbd"
    loop=$(losetup -f --show "$work/fuse/nbd") || { loop=''; return 1; }
    mkfs.ext4 -q -F "$loop"
    mount "$loop" "$mnt"
}
if mount_disk; then
    real=yes
    step "Ageing it: a real ext4, 60 files of 1 to 20 MiB, two thirds of them deleted, fstrim"
    for i in $(seq 60); do head -c $(((i * 7 % 20 + 1) << 20)) /dev/urandom >"$mnt/file$i"; done
    sync -f "$mnt"
    for i in $(seq 60); do [ $((i % 3)) = 0 ] || rm "$mnt/file$i"; done
    sync -f "$mnt"
    fstrim "$mnt"
    (cd "$mnt" && sha256sum file*) >"$work/sums"
    write_on() {
        local n=0
        until [ -e "$work/stop" ]; do
            head -c $((n * 5 % 9 + 1))M /dev/urandom >"$mnt/new$((n % 12))"
            n=$((n + 1))
            echo $n >"$work/writes.new"
            mv "$work/writes.new" "$work/writes"
            sleep 0.2 # a guest that is busy, not one that fills the disk as fast as it is emptied
        done
        (cd "$mnt" && sha256sum new*) >>"$work/sums"
    }
    verify() {
        umount "$mnt"
        blockdev --flushbufs "$loop"
        mount "$loop" "$mnt"
        (cd "$mnt" && sha256sum --quiet -c "$work/sums") && echo "all $(wc -l <"$work/sums") files have their checksums"
        umount "$mnt"
    }
else
    real=no
    step "Ageing it (no root, fuse or loop device here, so without a file system): 512 MiB in random order, two thirds trimmed"
    cat >"$work/disk.py" <<'END'
import hashlib, os, random, sys, time
import nbd
work, task = sys.argv[1:]
h = nbd.NBD()
h.connect_unix(work + "/sock")
block = lambda n, turn: hashlib.sha256(b"%d %d" % (n, turn)).digest() * 2048
if task == "age":
    order = list(range(8192))
    random.Random(1).shuffle(order)
    for n in order: h.pwrite(block(n, 0), n << 16)
    for n in order:
        if n % 3: h.trim(65536, n << 16)
elif task == "write":
    turn = 0
    while not os.path.exists(work + "/stop"):
        turn += 1
        for n in range(20000, 20200): h.pwrite(block(n, turn), n << 16)
        open(work + "/writes.new", "w").write("%d\n" % turn)
        os.rename(work + "/writes.new", work + "/writes")
        time.sleep(0.2)
    open(work + "/turn", "w").write(str(turn))
else:
    turn = int(open(work + "/turn").read())
    for n in range(8192): assert h.pread(65536, n << 16) == (bytes(65536) if n % 3 else block(n, 0)), n
    for n in range(20000, 20200): assert h.pread(65536, n << 16) == block(n, turn), n
    print("all 8392 blocks are what was written")
h.flush()
h.shutdown()
END
    /usr/bin/python3 "$work/disk.py" "$work" age
    write_on() { /usr/bin/python3 "$work/disk.py" "$work" write; }
    verify() { /usr/bin/python3 "$work/disk.py" "$work" verify; }
fi

step "Before: $(size)"
"$qlean" status "$socket"

step "A writer starts and keeps writing; the image is compacted under it: qlean compact SOCKET"
write_on &
writer=$!
wait_for test -s "$work/writes"
"$qlean" compact "$socket"
echo "the writer finished $(cat "$work/writes") rounds meanwhile, and goes on"
kill -0 "$writer"

step "The writer stops; what it wrote meanwhile is made compact too"
touch "$work/stop"
wait "$writer"
writer=''
[ $real = no ] || { sync -f "$mnt"; fstrim "$mnt"; }
"$qlean" compact "$socket"
step "After: $(size)"

step "Checking the data, stopping the server, and asking the judge: qemu-img check"
verify
if [ $real = yes ]; then losetup -d "$loop"; loop=''; umount "$work/fuse"; wait "$fuse" || true; fuse=''; fi
kill "$server"
wait "$server"
server=''
qemu-img check "$image"
