// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The heart of the filter: passes the guest's writes, discards and zeroes down to the disk, keeps the record of what
// the guest has thrown away, and gives whole clusters back.
//
// Invariants, each of which loses a guest's write when broken:
//  - a write holds its clusters shared from before it clears the record until the inner write has returned, so nothing
//    is recorded or given back under it;
//  - a discard, a zeroing and an all-zero payload hold their clusters exclusively around the inner call and the
//    recording, so a write that overlaps comes wholly before or wholly after both;
//  - giving back holds the clusters exclusively from reading the record to the end of the inner call;
//  - only what the inner call succeeded for is recorded, and what it failed for is forgotten.

#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>

#include <nbdkit-filter.h>

#include "filter/cluster_lock.h"
#include "filter/geometry.h"
#include "filter/record.h"
#include "filter/status.h"

namespace qlean {

/// The disk below, as one connection sees it. Results are nbdkit's: 0, or -1 with *err set.
struct InnerDisk {
    nbdkit_next *next = nullptr;
    bool trims = false;   ///< trim may be called
    bool zeroes = false;  ///< zero may be called and isn't just a write of zeroes
    bool flushes = false; ///< flush may be called
};

class Watcher {
  public:
    Watcher(std::uint64_t disk_size, std::uint32_t cluster_size, std::size_t memory)
        : geometry_(disk_size, cluster_size), record_(geometry_, memory) {}

    const Geometry &geometry() const { return geometry_; }
    /// The disk has at least this size now: it may be resized between two connections.
    void grow(std::uint64_t disk_size);

    int write(const InnerDisk &disk, const void *buffer, std::uint32_t count, std::uint64_t offset, std::uint32_t flags,
              int *err);
    int trim(const InnerDisk &disk, std::uint32_t count, std::uint64_t offset, std::uint32_t flags, int *err);
    int zero(const InnerDisk &disk, std::uint32_t count, std::uint64_t offset, std::uint32_t flags, int *err);

    /// A change that reaches the disk by another way than the three above (another export may be the same disk).
    int unwatched_change(ByteRange range, const std::function<int()> &inner);

    /// The plan: calls add(range, to_do) for consecutive parts of the range until it returns false.
    void plan(const InnerDisk &disk, ByteRange range, const std::function<bool(ByteRange, bool)> &add) const;

    /// Gives back every ready cluster that touches the range. interrupted() is asked between steps; when it is true
    /// the rest is left and *err is ESHUTDOWN.
    int reclaim(const InnerDisk &disk, ByteRange range, const std::function<bool()> &interrupted, int *err);

    ReclaimStatus status() const;

  private:
    enum class Kind { discard, zero_may_trim, zero_keep };

    using Hold = ClusterLocks::Hold;

    int punch(const InnerDisk &disk, Kind kind, ByteRange range, std::uint32_t flags, int *err);
    int punch_chunk(const InnerDisk &disk, Kind kind, ByteRange range, std::uint32_t flags, int *err);
    void give_back_if_complete(const InnerDisk &disk, std::uint64_t cluster);
    int give_back(const InnerDisk &disk, const Record::Ready &ready, int *err);
    static bool can_give_back(const InnerDisk &disk, const Record::Ready &ready);

    Geometry geometry_;
    Record record_;
    ClusterLocks locks_;
    std::atomic<std::uint64_t> given_back_bytes_{0};
};

} // namespace qlean
