#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# Usage: luks.sh 2|3 [CLUSTER...], or luks.sh secrets. Images encrypted with LUKS: QEMU writes and we read the same, we write and QEMU reads,
# compaction moves beside the guest (and so encrypts anew), killed servers lose nothing, and nothing of the guest's text is
# in the file. secrets: how the passphrase is given, and what is refused.
. "$(dirname "$0")/../lib.sh"
need qemu-img qemu-io
mode=${1:?2, 3 or secrets}
printf 'open-sesame\n' >"$W/secret"
printf 'wrong' >"$W/wrong"
chmod 600 "$W/secret" "$W/wrong"
secret=(--object secret,id=k,data=open-sesame)
opts() { echo "driver=qcow2,file.filename=$1,encrypt.format=luks,encrypt.key-secret=k"; }
qemu_does() { # IMAGE COMMAND...: qemu-io with the key
    local image=$1 c args=()
    shift
    for c; do args+=(-c "$c"); done
    qemu-io "${secret[@]}" "${args[@]}" --image-opts "$(opts "$image")" >"$W/qemu-io.txt" 2>&1 && ! grep -qi 'fail\|error' "$W/qemu-io.txt" ||
        fail "qemu-io: $(cat "$W/qemu-io.txt")"
}
# QEMU checks an encrypted image only with its key; after a kill leaks (3) are allowed
judge_luks() { # IMAGE [ALLOWED STATUS]
    local rc=0
    qemu-img check "${secret[@]}" --image-opts "$(opts "$1")" >"$W/judge.txt" 2>&1 || rc=$?
    [ $rc = 0 ] || [ $rc = "${2:-0}" ] || { cat "$W/judge.txt" >&2; fail "qemu-img check of $1: $rc"; }
}
# same IMAGE: clean, and the model's bytes by QEMU's eyes
same() {
    judge_luks "$1"
    qemu-img compare "${secret[@]}" --image-opts "$(opts "$1")" "driver=raw,file.filename=$W/model" >"$W/compare.txt" 2>&1 ||
        fail "$1 and its model differ: $(cat "$W/compare.txt")"
}

if [ "$mode" = secrets ]; then
    image=$W/disk.qcow2
    create_luks "$image" 8M
    refused "$image" 'is encrypted: give its passphrase'
    refused "$image" 'the passphrase does not open' passphrase=+"$W/wrong"
    refused "$image" 'can be read by everybody' passphrase=open-sesame
    expect_failure 'a missing passphrase' nbdkit -U - "$PLUGIN" file="$image" passphrase=+"$W/nowhere" --run true
    grep -q 'the passphrase cannot be read' "$W/failed.txt" || fail "$(cat "$W/failed.txt")" # nbdkit's own line says why
    works() { nbdkit -U - "$PLUGIN" file="$image" "$@" --run 'nbdinfo --size "$uri"' >"$W/out.txt" 2>&1 || fail "$*: $(cat "$W/out.txt")"; }
    works passphrase=+"$W/secret"
    works passphrase=-7 7<"$W/secret"
    works -r passphrase=+"$W/secret"
    # in the daemon nothing is left for ps to show
    start_server "$image" passphrase=+"$W/secret"
    ! tr '\0' ' ' <"/proc/$SERVER/cmdline" | grep -q sesame || fail "the passphrase is on the command line"
    [ "$(status .image.encryption)" = '"luks"' ] || fail "status: $(status .image)"
    stop_server
    expect_failure 'qlean without a passphrase' "$QLEAN" status "$image"
    grep -q 'is encrypted' "$W/failed.txt" || fail "$(cat "$W/failed.txt")"
    "$QLEAN" compact --passphrase-file "$W/secret" "$image" >"$W/qlean.log" 2>&1 || fail "$(cat "$W/qlean.log")"
    judge_luks "$image"

    # Below another image it opens with the same passphrase, whether or not that one is encrypted too.
    base=$W/base.qcow2
    create_luks "$base" 8M
    qemu_does "$base" 'write -P 21 1M 300k'
    before=$(sha "$base")
    for kind in plain luks; do
        image=$W/top-$kind.qcow2 own=
        if [ $kind = plain ]; then
            create -u -b "$base" -F qcow2 "$image" 8M
        else
            create_luks "$image" 8M -u -b "$base" -F qcow2
            own=,encrypt.format=luks,encrypt.key-secret=k
        fi
        start_server "$image" passphrase=+"$W/secret"
        nbdsh_do "$URI" '
assert h.pread(300 << 10, 1 << 20) == bytes([21]) * (300 << 10)
h.pwrite(b"n" * 70000, 5 << 20); h.pwrite(b"n" * 512, (1 << 20) + 512)'
        stop_server
        below=backing.driver=qcow2,backing.file.filename=$base,backing.encrypt.format=luks,backing.encrypt.key-secret=k
        qemu-io "${secret[@]}" -c 'read -P 110 5M 69632' -c 'read -P 110 1049088 512' -c 'read -P 21 1100k 100k' \
            --image-opts "driver=qcow2,file.filename=$image$own,$below" >"$W/qemu-io.txt" 2>&1 &&
            ! grep -qi 'fail\|error' "$W/qemu-io.txt" || fail "$kind over luks: $(cat "$W/qemu-io.txt")"
        [ "$(sha "$base")" = "$before" ] || fail "$kind over luks: the base was changed"
    done
    image=$W/top-plain.qcow2
    refused "$image" "base.qcow2' is encrypted: give its passphrase"

    # What is not LUKS, or not as we know it
    qemu-img create -q --object secret,id=k,data=open-sesame -f qcow2 -o encrypt.format=aes,encrypt.key-secret=k "$W/aes.qcow2" 8M 2>/dev/null
    image=$W/aes.qcow2
    refused "$image" 'legacy AES' passphrase=+"$W/secret"
    create_luks "$W/twofish.qcow2" 8M -o encrypt.cipher-alg=twofish-256
    image=$W/twofish.qcow2
    refused "$image" 'twofish-xts-plain64' passphrase=+"$W/secret"
    # Other modes of AES
    for o in cipher-alg=aes-128 cipher-alg=aes-256,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha256 \
        cipher-alg=aes-256,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=plain64 cipher-alg=aes-256,encrypt.ivgen-alg=plain,encrypt.hash-alg=sha1; do
        image=$W/other.qcow2
        rm -f "$image" "$W/model"
        create_luks "$image" 4M -o "encrypt.$o"
        qemu_does "$image" 'write -P 17 1M 300k'
        start_server "$image" passphrase=+"$W/secret"
        nbdsh_do "$URI" 'assert h.pread(300 << 10, 1 << 20) == b"\x11" * (300 << 10); h.pwrite(b"\x22" * 1000, 2000077); h.flush()'
        stop_server
        qemu_does "$image" 'read -P 34 2000077 1000' 'read -P 17 1M 300k'
        judge_luks "$image"
    done
    exit
fi

compat=1.1
[ "$mode" = 3 ] || compat=0.10
shift
[ $# -gt 0 ] || set -- 512 4k 64k 2M
for cluster; do
    image=$W/$cluster.qcow2
    create_luks "$image" 12M -o "compat=$compat,cluster_size=$cluster"
    qemu_does "$image" 'write -P 77 1234944 100352' 'write -P 3 6M 5M' 'discard 7M 1M' 'write -z 8M 1M'
    qemu-img convert "${secret[@]}" --image-opts "$(opts "$image")" -O raw "$W/model"
    start_server --reclaim "$image" passphrase=+"$W/secret"
    nbdcopy "$URI" "$W/out"
    cmp "$W/out" "$W/model" || fail "$cluster: what QEMU wrote is not what we read"
    busy "$cluster" 200 --largest 262144 --connections 2
    stop_server
    same "$image"
    qemu_does "$image" 'write -P 78 2234944 100352' 'discard 4M 2M'
    qemu-img convert "${secret[@]}" --image-opts "$(opts "$image")" -O raw "$W/model"
    start_server "$image" passphrase=+"$W/secret"
    guest --model "$W/model" --requests 50 --largest 262144 >"$W/guest.log" 2>&1 || fail "$cluster: after QEMU: $(cat "$W/guest.log")"
    nbdsh_do "$URI" 'h.flush()'
    kill_server
    judge_luks "$image" 3
    start_server "$image" passphrase=+"$W/secret"
    compact
    stop_server
    same "$image"
done

say 'the text of the guest is nowhere in the file, wherever its clusters went'
image=$W/marker.qcow2
create_luks "$image" 24M -o "compat=$compat,cluster_size=4k"
start_server "$image" passphrase=+"$W/secret"
nbdsh_do "$URI" '
mark = b"the-secret-of-the-guest-" * 3072
for at in range(0, 24 << 20, 1 << 20): h.pwrite(mark, at + 77)
h.flush()
for at in range(0, 12 << 20, 1 << 20): h.trim(1 << 20, at)
h.flush()'
compact
nbdsh_do "$URI" '
mark = b"the-secret-of-the-guest-" * 3072
for at in range(12 << 20, 24 << 20, 1 << 20): assert h.pread(len(mark), at + 77) == mark
for at in range(0, 12 << 20, 1 << 20): assert not any(h.pread(len(mark), at + 77))'
stop_server
! grep -qa 'the-secret-of-the' "$image" || fail "plain text in the image file"
judge_luks "$image"
lean_length=$(length "$image")
[ "$lean_length" -lt $((4 << 20)) ] || fail "compact left $lean_length bytes"
qemu_does "$image" 'read 0 24M' 'read -P 0 0 12M'
