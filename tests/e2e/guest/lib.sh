# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# For tests with a Linux guest; source ../lib.sh first. It owns the guest's kernel and initramfs, kept in the build
# directory from test to test. The guest's console is $W/serial.txt.
#
# shellcheck shell=bash disable=SC2034
GUEST_DIR=$BUILD/guest
need qemu-system-x86_64 busybox mke2fs apt-get
"$TESTS/e2e/guest/build.sh" "$GUEST_DIR" >"$W/build.log" 2>&1 || fail "the guest cannot be built: $(tail -n 3 "$W/build.log")"

# pack_job: makes $W/initrd, the guest's initramfs with standard input as its /job
pack_job() {
    mkdir -p "$W/job"
    cat >"$W/job/job"
    { cat "$GUEST_DIR/initramfs.gz"; (cd "$W/job" && echo job | busybox cpio -o -H newc -R 0:0 2>/dev/null) | gzip; } >"$W/initrd"
}

# guest_said PATTERN / guest_says SECONDS PATTERN: whether the guest told it, or has within so many seconds
guest_said() { grep -aq "^GUEST $1" "$W/serial.txt" 2>/dev/null; }
guest_says() {
    eventually "$1" guest_spoke "$2" || { tail -n 20 "$W/serial.txt" >&2; fail "no '$2' from the guest in $1 s"; }
    ! guest_said FAIL || fail "$(grep -a '^GUEST FAIL' "$W/serial.txt" | head -n 3)"
}
guest_spoke() { guest_said "$1" || guest_said FAIL; }
