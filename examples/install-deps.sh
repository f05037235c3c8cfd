#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# Usage: install-deps.sh [build] [try] [test]. The project's one list of Debian packages (12 and 13): what building needs,
# what trying it out needs, and what the tests need besides. Installs those that are missing; without a word, all three.
set -euo pipefail

declare -A packages=(
    [build]="g++ meson ninja-build pkg-config perl libfmt-dev libssl-dev libcryptsetup-dev nlohmann-json3-dev libcli11-dev libnbd-dev nbdkit
        nbdkit-plugin-dev catch2 zlib1g-dev libzstd-dev"
    [try]="libnbd-bin fuse3 qemu-utils e2fsprogs python3 python3-libnbd"
    [test]="qemu-system-x86 libvirt-clients libvirt-daemon libvirt-daemon-driver-qemu xfsprogs btrfs-progs busybox-static
        jq fio strace procps xz-utils zstd openssl systemd clang libclang-rt-dev"
)

[ $# -gt 0 ] || set -- build try test
missing=()
for part; do
    for package in ${packages[$part]}; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
    done
done
[ "${#missing[@]}" -gt 0 ] || exit 0

as_root=(env)
if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || { echo "These packages are missing, and installing them takes root or sudo: ${missing[*]}" >&2; exit 1; }
    as_root=(sudo)
fi
echo "installing: ${missing[*]}"
"${as_root[@]}" apt-get -qq update
"${as_root[@]}" DEBIAN_FRONTEND=noninteractive apt-get -qq -y install --no-install-recommends "${missing[@]}" >/dev/null
