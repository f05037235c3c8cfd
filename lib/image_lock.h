// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// QEMU's image locks: OFD locks on single bytes of the file that tell every other QEMU program, and a second server,
// what this one does with the image. They live as long as the descriptor.
#pragma once

#include "posix_file.h"

namespace qlean {

/// Takes the locks that a QEMU process with the same access would take. Throws Error (busy) naming the file if
/// somebody else uses the image in a way that conflicts, Error (io) if the file system has no such locks.
void lock_image(const PosixFile &file, PosixFile::Access access);

/// The same for a file that holds an image's data: QEMU lets others write there too, if they say that they share it.
void lock_data_file(const PosixFile &file, PosixFile::Access access);

} // namespace qlean
