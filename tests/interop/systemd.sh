#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# The units in examples/: systemd takes them and rates their sandbox; what they start serves from a socket that systemd
# opened; and it makes no system call that the sandbox does not allow.
. "$(dirname "$0")/../lib.sh"
need systemd-analyze systemd-socket-activate strace

cp "$TESTS/../examples/"qlean@.* "$W"
unit=$W/qlean@.service
# Man pages may not be installed, nor nbdkit where Debian has it; nothing else may be said about the units.
sed '/^Documentation=/d; s|^ExecStart=[^ ]*|ExecStart=/bin/true|' "$unit" >"$W/checked@.service"
sed 's|^ListenStream=.*|&\nService=checked@%i.service|' "$W/qlean@.socket" >"$W/checked@.socket"
# A server that was killed: the shell must stop the socket of this very image, whose name systemd has escaped.
escaped=$(systemd-escape --path '/vm/my-web server.qcow2')
fence=$(sed -n "s/^ExecStopPost=+\/bin\/sh -c '\(.*\)'$/\1/p" "$unit")
[ -n "$fence" ] || fail "no ExecStopPost that this test knows"
fence=${fence//%i/"$escaped"}
stopped=$(SERVICE_RESULT=signal sh -c "systemctl() { printf '%s' \"\$2\"; }; $fence")
[ "$stopped" = "qlean@$escaped.socket" ] || fail "after a kill '$stopped' is stopped instead of 'qlean@$escaped.socket'"
[ -z "$(SERVICE_RESULT=success sh -c "systemctl() { printf '%s' \"\$2\"; }; $fence")" ] || fail "a socket is stopped after a clean end"
for u in "$W/checked@disk.qcow2.service" "$W/checked@disk.qcow2.socket"; do
    systemd-analyze verify "$u" >"$W/verify.txt" 2>&1 || fail "systemd-analyze verify: $(cat "$W/verify.txt")"
    ! grep "checked@" "$W/verify.txt" || fail "systemd complains about a unit"
done
exposure=$(systemd-analyze security --offline=yes --no-pager "$unit" | sed -n 's/.*Overall exposure level[^:]*: \([0-9.]*\) .*/\1/p')
say "exposure $exposure of 10"
[ -n "$exposure" ] || fail "systemd-analyze rates nothing"
[ "$(printf '%s\n' "$exposure" 1.0 | sort -n | head -1)" = "$exposure" ] || fail "the sandbox is rated $exposure"

# set_of NAME...: the system calls in these sets, and in sets within them
set_of() {
    local name line
    for name; do
        systemd-analyze syscall-filter "$name" --no-pager | sed 's/\x1b\[[0-9;]*m//g' | grep '^    [^#]' | while read -r line; do
            case $line in @*) set_of "$line" ;; *) echo "$line" ;; esac
        done
    done
}
filters=$(sed -n 's/^SystemCallFilter=//p' "$unit")
[ "$filters" = $'@system-service\n~@privileged @resources' ] || fail "the filter is not what this test knows: $filters"
set_of @default @system-service | sort -u >"$W/allowed"
set_of @privileged @resources | sort -u | comm -23 "$W/allowed" - >"$W/allowed.now"
[ "$(wc -l <"$W/allowed.now")" -gt 100 ] || fail "systemd-analyze lists no system calls"

random_file "$W/data" 8M
create "$W/disk.qcow2" 64M
qemu-io -c "write -s $W/data 0 8M" -c "write -s $W/data 16M 8M" -c 'discard 0 8M' "$W/disk.qcow2" >/dev/null
qemu-img convert -f qcow2 -O raw "$W/disk.qcow2" "$W/model"
# What the unit starts, with the modules of this build.
start=$(sed -n 's/^ExecStart=//p' "$unit")
start=${start/--filter=reclaim/--filter=$FILTER}
start=${start/ qcow2 / $PLUGIN }
start=${start/\%f/$W/disk.qcow2}
read -ra command <<<"$start"
[ -x "${command[0]}" ] || command[0]=$(command -v nbdkit)
SOCK=$W/sock
URI="nbd+unix:///?socket=$SOCK"
run_pid "$W/server1.log" strace -f -qq -o "$W/calls" -e trace=all --seccomp-bpf \
    systemd-socket-activate -l "$SOCK" -E "PATH=$PATH" "${command[@]}"
SERVER=$PID
eventually 10 test -S "$SOCK" || fail "no socket"
qemu-io -f raw -c 'write -P 7 40M 1M' -c 'discard 20M 1M' -c flush "$URI" >/dev/null
qemu-io -f raw -c 'write -P 7 40M 1M' -c 'write -z 20M 1M' "$W/model" >/dev/null
"$QLEAN" compact -q --fast "$SOCK" >/dev/null
"$QLEAN" status "$SOCK" >/dev/null
nbdkit_pid=$(pgrep -P "$SERVER")
kill "$nbdkit_pid"
gone "$SERVER" || fail "the server still runs 10 s after SIGTERM"
judge "$W/disk.qcow2" "$W/model"

# From the moment that nbdkit itself runs; systemd makes what comes before.
main=$(grep -m1 'execve(".*nbdkit' "$W/calls" | cut -d' ' -f1)
sed -n "/^$main .*execve(.*nbdkit/,\$p" "$W/calls" | sed -n 's/^[0-9]* *\([a-z_0-9]*\)(.*/\1/p' | sort -u >"$W/used"
[ "$(wc -l <"$W/used")" -gt 20 ] || fail "strace saw next to nothing: $(cat "$W/used")"
comm -23 "$W/used" "$W/allowed.now" >"$W/forbidden"
[ ! -s "$W/forbidden" ] || fail "the sandbox would not allow: $(tr '\n' ' ' <"$W/forbidden")"
say "$(wc -l <"$W/used") system calls, all within $(wc -l <"$W/allowed.now") allowed ones"
