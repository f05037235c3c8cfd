#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# Usage: serve-modes.sh plain|reclaim|connections|one-thread|log|stats. A server started in this way holds what a random
# guest wrote, with `qlean compact` running beside the guest.
. "$(dirname "$0")/../lib.sh"
arguments=() connections=1 filter=() size=192M go=compact
case ${1:?a mode} in
plain) size=64M go=compact_kindly ;; # as users do it
reclaim) filter=(--reclaim) ;;
connections) filter=(--reclaim) connections=4 ;;
one-thread) filter=(--reclaim) arguments=(-t 1) connections=2 ;;
log) filter=(--reclaim) arguments=(--filter=log logfile="$W/requests.txt") connections=2 ;;
stats) filter=(--reclaim) arguments=(--filter=stats statsfile="$W/stats.txt") connections=2 ;;
*) fail "no mode $1" ;;
esac

create "$W/disk.qcow2" $size
start_server "${filter[@]}" "$W/disk.qcow2" "${arguments[@]}"
guest --model "$W/model" --seconds 3 --connections $connections
guest_beside --model "$W/model" --connections $connections
sleep 0.5
$go
$go
guest_end
$go
stop_server
judge "$W/disk.qcow2" "$W/model"
lean "$W/disk.qcow2" 102
case $1 in
log) grep -q ' Cache ' "$W/requests.txt" || fail "the log filter saw no CACHE" ;;
stats) grep -q '^trim:' "$W/stats.txt" || fail "the stats filter counted no trim" ;;
esac
