// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The images that the workloads begin with. The seed decides what is where in them.
#pragma once

#include "tests/fault/faulty_file.h"

namespace qlean::fault {

Bytes empty_small(std::uint64_t seed);
Bytes empty_host_blocks(std::uint64_t seed);
Bytes empty_usual(std::uint64_t seed);
/// Refcount blocks and the refcount table grow: 512-byte clusters, and an image that starts small.
Bytes empty_to_grow(std::uint64_t seed);
Bytes scattered_small(std::uint64_t seed);
Bytes scattered_host_blocks(std::uint64_t seed);
/// Subclusters of every kind, in host clusters that are full of bytes which must not show.
Bytes scattered_subclusters(std::uint64_t seed);
/// Metadata at the end of the file, most of the disk unused: L1, refcount table, blocks and L2 tables all move. The L1
/// table is several clusters long.
Bytes metadata_at_the_end(std::uint64_t seed);
Bytes with_snapshots(std::uint64_t seed);
Bytes compressed_image(std::uint64_t seed);
Bytes compressed_with_snapshots(std::uint64_t seed);
Bytes with_bitmaps(std::uint64_t seed);
Bytes to_be_resized(std::uint64_t seed);

} // namespace qlean::fault
