// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// What mappings say of a disk without its bytes being read, for the active disk and for snapshots: its extents, and
// what is worth reading ahead.
#pragma once

#include "image.h"

#include <span>

namespace qlean {

/// The extents of a range, added in ascending order. Adjacent equal ones are joined, and what is unallocated in a row
/// is asked of what lies below at once.
class ExtentList {
  public:
    ExtentList(State &state, std::size_t most) : state_(state), most_(most) {}

    /// Of cluster `c`, which has the mapping `m`: bytes [within, within + length) of it.
    void add(GuestCluster c, const Mapping &m, std::uint64_t within, std::uint64_t length);
    /// A range that is unallocated as a whole.
    void add_unallocated(GuestOffset from, GuestOffset to);
    /// To be called where a range of mappings ends, while what is said of them is still true.
    void settle();

    /// There are more than are wanted.
    bool full() const { return found_.size() > most_; }
    std::vector<Image::Extent> take();

  private:
    void append(GuestOffset from, std::uint64_t length, bool allocated, bool zero);

    State &state_;
    const std::size_t most_;
    std::vector<Image::Extent> found_;
    GuestOffset below_from_{0}, below_to_{0}; // unallocated, and not asked for yet
};

/// Asks the host to read ahead what lies in [at, at + length), a range of clusters that begin with `first` and have
/// these mappings.
void prefetch_mapped(State &state, GuestCluster first, std::span<const Mapping> mappings, GuestOffset at,
                     std::uint64_t length);

} // namespace qlean
