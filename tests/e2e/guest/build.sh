#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# Usage: build.sh DIR. Makes DIR/vmlinuz and DIR/initramfs.gz, a Linux guest that boots in two seconds: Debian's cloud
# kernel and guest agent, downloaded and unpacked but not installed, busybox, mke2fs, and init beside this file.
# What is there already is kept; two callers at once wait for each other. Needs no root.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
out=$(cd "$1" && pwd)
exec 9>"$out/lock"
flock 9

download() {
    local kernel
    # the kernel that the meta package asks for
    kernel=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/^ *Depends: \(linux-image-[0-9]\)/\1/p' | head -n 1)
    [ -n "$kernel" ] || { echo "apt knows no linux-image-cloud-amd64: run apt-get update" >&2; exit 1; }
    rm -rf "$out/debs" "$out/unpacked"
    mkdir "$out/debs" "$out/unpacked"
    (cd "$out/debs" && apt-get -q download "$kernel" qemu-guest-agent) >&2
    for deb in "$out"/debs/*.deb; do dpkg-deb -x "$deb" "$out/unpacked"; done
    touch "$out/unpacked/complete"
}
[ -e "$out/unpacked/complete" ] || download
[ ! "$out/initramfs.gz" -nt "$here/init" ] || [ ! "$out/initramfs.gz" -nt "$here/build.sh" ] || exit 0

modules=$(find "$out/unpacked" -type d -path '*/lib/modules/*' -name '[0-9]*' | head -n 1)
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
mkdir -p "$root"/{bin,dev,etc,mnt,modules,proc,run,sys,tmp,var}
ln -s bin "$root/sbin"
ln -s /run "$root/var/run"

# program SOURCE NAME: into /bin, its libraries to where its loader looks for them
program() {
    local library
    cp -L "$1" "$root/bin/$2"
    for library in $(ldd "$1" 2>/dev/null | grep -o '/[^ ]*' || true); do # none: linked statically
        mkdir -p "$root$(dirname "$library")"
        cp -Ln "$library" "$root$library"
    done
}
program "$(command -v busybox)" busybox
program "$(command -v mke2fs)" mkfs.ext4
program "$(find "$out/unpacked" -type f -name qemu-ga)" qemu-ga
cp /etc/mke2fs.conf "$root/etc/"
for applet in $("$root/bin/busybox" --list); do
    [ -e "$root/bin/$applet" ] || ln -s busybox "$root/bin/$applet"
done

# module NAME: after what it depends on, into /modules; one that has no file is built into the kernel
declare -A taken
module() {
    local name=${1//-/_} file needed
    [ -z "${taken[$name]:-}" ] || return 0
    taken[$name]=1
    file=$(find "$modules" -name '*.ko*' | awk -F/ -v n="$name" '{f=$NF; sub(/\.ko.*/, "", f); gsub(/-/, "_", f)} f == n' | head -n 1)
    [ -n "$file" ] || return 0
    case $file in
    *.xz) xz -dc "$file" >"$root/modules/$name.ko" ;;
    *.zst) zstd -qdc "$file" >"$root/modules/$name.ko" ;;
    *) cp "$file" "$root/modules/$name.ko" ;;
    esac
    for needed in $(tr '\0' '\n' <"$root/modules/$name.ko" | sed -n 's/^depends=//p' | tr ',' ' '); do module "$needed"; done
    echo "$name" >>"$root/modules/order"
}
for m in virtio_pci virtio_blk virtio_console ext4; do module "$m"; done

install -m 755 "$here/init" "$root/init"
printf '#!/bin/sh\nsync; umount /mnt; poweroff -f\n' >"$root/bin/shutdown.agent"
rm -f "$root/bin/shutdown"
mv "$root/bin/shutdown.agent" "$root/bin/shutdown" # what the agent calls
chmod 755 "$root/bin/shutdown"
cp "$out"/unpacked/boot/vmlinuz-* "$out/vmlinuz"
(cd "$root" && find . | LC_ALL=C sort | busybox cpio -o -H newc -R 0:0 2>/dev/null) | gzip -1 >"$out/initramfs.tmp"
mv "$out/initramfs.tmp" "$out/initramfs.gz"
