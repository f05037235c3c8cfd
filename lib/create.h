// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Making a new, empty image (docs/interop/qcow2, "Header"): header, refcount table, refcount blocks, L1 table, in
// that order from the start of the file.
#pragma once

#include "file.h"

namespace qlean {

struct CreateOptions {
    std::uint64_t virtual_size = 0;     ///< bytes
    std::uint64_t cluster_size = 65536; ///< a power of two from 512 to 2 MiB
    unsigned version = 3;               ///< 2 or 3
    unsigned refcount_order = 4;        ///< log2 of the width of a refcount in bits, 0 to 6; version 2 has only 4
    bool extended_l2 = false;           ///< subclusters: from 16 KiB clusters on, in version 3
};

/// Writes an empty image into `file`, which is empty, and makes it durable. Throws Error if the options are impossible.
void create_image(File &file, const CreateOptions &options);

} // namespace qlean
