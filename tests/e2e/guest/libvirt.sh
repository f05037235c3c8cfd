# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# libvirt without a daemon, for tests with a guest; source lib.sh beside this file first. One virsh process is the driver
# (qemu:///embed) and its client, under a root of its own in $W: nothing of the host's libvirt is touched. QEMU is ended
# by its pid file whatever becomes of virsh. What libvirt probes of QEMU, 8 s, is kept in the build directory.
#
# shellcheck shell=bash
need virsh
mkdir -p "$W/l/etc" "$GUEST_DIR/libvirt-cache"
ln -s "$GUEST_DIR/libvirt-cache" "$W/l/cache"
cat >"$W/l/etc/qemu.conf" <<'END'
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
cgroup_controllers = []
namespaces = []
stdio_handler = "file"
END
exec 8>"$GUEST_DIR/libvirt-lock"
flock -w 300 8 || fail "another test holds libvirt's cache" # one driver at a time writes to it

# libvirt looks up the user that it would run QEMU as before it reads the configuration. Debian makes that user with
# libvirt-daemon-system, which would bring a daemon: where it is missing, this virsh sees one.
as_if=()
if ! getent passwd libvirt-qemu >/dev/null; then
    for database in passwd group; do cp "/etc/$database" "$W/$database"; done
    echo "libvirt-qemu:x:64055:64055:::/usr/sbin/nologin" >>"$W/passwd"
    echo "libvirt-qemu:x:64055:" >>"$W/group"
    as_if=(unshare --mount sh -c 'for d in passwd group; do mount --bind "$0/$d" "/etc/$d" || exit; done; exec "$@"' "$W")
fi
mkfifo "$W/to-virsh" "$W/from-virsh"
"${as_if[@]}" virsh -c "qemu:///embed?root=$W/l" <"$W/to-virsh" >"$W/from-virsh" 2>&1 8>&- &
PIDS+=($!)
exec {to_virsh}>"$W/to-virsh" {from_virsh}<"$W/from-virsh"
end_domains() { local f; for f in "$W"/l/run/qemu/*.pid; do [ ! -s "$f" ] || end_pid "$(cat "$f")"; done; }
on_exit end_domains

# v COMMAND: one virsh command; what it prints goes to stdout, and an error ends the test
v() {
    v_try "$@" || fail "virsh $*: $V"
    printf '%s' "$V"
}

# v_try COMMAND: the same into $V, false after an error
v_try() {
    local line mark="end of $RANDOM$RANDOM"
    (printf '%s\necho "%s"\n' "$*" "$mark" >&"$to_virsh") || true # it has ended: what it said comes next
    V=
    while IFS= read -r -t 120 line <&"$from_virsh"; do
        case $line in
        *"echo \"$mark"*) ;; # the command itself, where virsh repeats it
        *"$mark"*) [[ $V != *error:* ]]; return ;;
        "virsh # "* | *"info :"* | *"warning :"*) ;;
        ?*) V+=$line$'\n' ;;
        esac
    done
    V+="error: no answer from virsh"
    return 1
}

# domain NAME: the domain's XML, with $SOCK as its disk and the guest of pack_job
domain() {
    cat <<END
<domain type='qemu'>
  <name>$1</name>
  <memory unit='MiB'>192</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>$GUEST_DIR/vmlinuz</kernel>
    <initrd>$W/initrd</initrd>
    <cmdline>console=ttyS0 quiet panic=-1</cmdline>
  </os>
  <cpu mode='custom' match='exact' check='none'>
    <model fallback='forbid'>qemu64</model>
    <feature policy='require' name='rdrand'/>
  </cpu>
  <features><acpi/></features>
  <on_reboot>destroy</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
$(sed "s|/run/qlean/disk.sock|$SOCK|" "$TESTS/../examples/libvirt-disk.xml")
    <controller type='usb' model='none'/>
    <serial type='file'><source path='$W/serial.txt'/><target port='0'/></serial>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <memballoon model='none'/>
  </devices>
</domain>
END
}

# start_domain NAME: the guest of $W/initrd boots
start_domain() {
    : >"$W/serial.txt"
    domain "$1" >"$W/domain.xml"
    v create "$W/domain.xml" >/dev/null
}
ended() { v_try domstate "$1" || true; [[ $V == *"shut off"* || $V == *"failed to get domain"* ]]; }
end_of_domain() { eventually 60 ended "$1" || fail "the domain $1 does not end: $V"; }

# in_guest NAME SCRIPT: runs a shell script in the guest through its agent; prints its output, has its exit status
in_guest() {
    local pid json
    v_try qemu-agent-command "$1" "'{\"execute\":\"guest-exec\",\"arguments\":{\"path\":\"/bin/sh\",\"arg\":[\"-c\",\"echo $(base64 -w0 <<<"$2") | base64 -d | sh\"],\"capture-output\":true}}'" ||
        fail "guest-exec: $V"
    pid=$(jq '.return.pid' <<<"$V")
    while :; do
        v_try qemu-agent-command "$1" "'{\"execute\":\"guest-exec-status\",\"arguments\":{\"pid\":$pid}}'" || fail "guest-exec-status: $V"
        json=$V
        [ "$(jq .return.exited <<<"$json")" != true ] || break
        sleep 0.1
    done
    jq -r '.return."out-data" // empty' <<<"$json" | base64 -d
    return "$(jq '.return.exitcode // 1' <<<"$json")"
}
