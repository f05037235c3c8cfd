// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// A snapshot as a read-only disk, beside the guest that goes on with the active one. While one of these lives, the
// snapshot is not deleted. Offsets and lengths are bytes inside the snapshot's disk. Any thread.
//
// A read holds the range lock of the same guest offsets as a read of the active disk, over look-up and I/O: a cluster
// that snapshots share moves under that lock, wherever it is referred to from.
#pragma once

#include "image.h"

namespace qlean {

class SnapshotDisk {
  public:
    SnapshotDisk(State &state, Snapshots::Use use) : state_(state), use_(std::move(use)) {}

    std::uint64_t size() const { return use_->disk_size(); }
    const SnapshotEntry &entry() const { return use_->entry(); }

    void read(std::span<std::byte> into, GuestOffset at);
    std::vector<Image::Extent> extents(GuestOffset at, std::uint64_t length, std::size_t most);
    void prefetch(GuestOffset at, std::uint64_t length);

  private:
    template <class F>
    void each_piece(GuestOffset at, std::uint64_t length, std::uint64_t most, F &&f);

    State &state_;
    Snapshots::Use use_;
};

} // namespace qlean
