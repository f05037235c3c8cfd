// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Moving what belongs to persistent bitmaps, byte for byte: stored bits (a cluster each), tables and the directory
// (adjacent clusters). None of it has a guest offset, and no pointer is cached: a copy is durable before the one word
// that points to it is written, which is durable before the old place is given back.
#pragma once

#include "layout.h"

namespace qlean {

/// Clusters of bitmaps that lie at or beyond `end`. No lock held.
std::uint64_t bitmap_clusters_beyond(State &state, HostCluster end);
/// As adjacent_clusters_wanted(), of tables and directory.
std::uint64_t adjacent_bitmap_clusters_wanted(const State &state, HostCluster end);
/// Moves below `end` what there is room for, at most `most` clusters of stored bits. From within a task of
/// WriteBack::lead(); durable when it returns.
void move_bitmaps(State &state, HostCluster end, std::uint64_t most);

} // namespace qlean
