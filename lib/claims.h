// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Which host clusters the active image's L2 entries claim, as it was when their slices were first read. Snapshots or
// not, an image's own entries never share a cluster, but for compressed extents among themselves. A cluster that is
// claimed twice is damage that no count shows: it is written by neither (a write copies it), and never comes free.
//
// Only what was in the file counts: what is changed afterwards is given clusters that nobody has.
#pragma once

#include "l2_entry.h"
#include "metadata_guard.h"
#include "sparse_bits.h"

#include <span>

namespace qlean {

class Claims {
  public:
    /// `slices`: how many there can be. `end`: clusters of the file. `guard` is told what is claimed twice.
    Claims(const Geometry &geometry, const EntryFormat &format, std::uint64_t slices, std::uint64_t end,
           MetadataGuard &guard);

    /// What the image uses besides its active tables and the guest's data. Any thread.
    void taken(HostRun run);
    /// The entries of a slice as read from the file, in host byte order. Only the first time counts. Any thread.
    void read(std::uint64_t slice, std::span<const std::uint64_t> words);

    bool twice(HostCluster c) const { return twice_.has(c.value); }

  private:
    void found_twice(HostCluster c);

    Geometry geometry_;
    EntryFormat format_;
    const std::uint64_t end_; ///< what lies beyond was damaged when the image was opened: there is no bound to it
    MetadataGuard &guard_;
    SparseBits known_;                               // slices
    SparseBits data_, extents_, structures_, twice_; // host clusters
};

} // namespace qlean
