#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# A feature of QCOW2 that is not supported yet is refused at open, by its name, and the image stays as it is.
. "$(dirname "$0")/../lib.sh"
need qemu-img qemu-io

create -o compression_type=zstd "$W/compression.qcow2" 16M
printf '\x02' | dd of="$W/compression.qcow2" bs=1 seek=104 conv=notrunc status=none
refused "$W/compression.qcow2" 'compression type 2'
