// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// How the disk is cut up: bytes into clusters (the unit the image can free) and clusters into granules (the unit the
// record remembers). Arithmetic; the last cluster and the last granule may be cut short by the end of the disk.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace qlean {

/// A range of bytes on the guest's disk, [begin, end).
struct ByteRange {
    std::uint64_t begin;
    std::uint64_t end;

    std::uint64_t length() const { return end - begin; }
};

/// A run of clusters by number, [first, end).
struct ClusterRun {
    std::uint64_t first;
    std::uint64_t end;

    std::uint64_t count() const { return end - first; }
    bool empty() const { return first >= end; }
};

class Geometry {
  public:
    static constexpr std::uint32_t largest_granule = 4096;
    static constexpr std::uint32_t smallest_cluster = 512;
    static constexpr std::uint32_t largest_cluster = 32U << 20;

    static bool valid_cluster_size(std::uint64_t size) {
        return size >= smallest_cluster && size <= largest_cluster && (size & (size - 1)) == 0;
    }

    Geometry(std::uint64_t disk_size, std::uint32_t cluster_size)
        : disk_size_(disk_size), cluster_size_(cluster_size), granule_size_(std::min(largest_granule, cluster_size)) {}

    std::uint64_t disk_size() const { return disk_size_.load(std::memory_order_relaxed); }
    /// The disk became larger. Nobody may be relying on the last cluster.
    void grow(std::uint64_t disk_size) { disk_size_.store(disk_size, std::memory_order_relaxed); }
    std::uint32_t cluster_size() const { return cluster_size_; }
    std::uint32_t granule_size() const { return granule_size_; }

    /// Every cluster that has a byte in the range.
    ClusterRun touched(ByteRange r) const {
        r = clip(r);
        if (r.begin >= r.end)
            return {0, 0};
        return {r.begin / cluster_size_, (r.end - 1) / cluster_size_ + 1};
    }

    /// Every cluster that lies wholly in the range.
    ClusterRun covered(ByteRange r) const {
        r = clip(r);
        const std::uint64_t first = round_up(r.begin) / cluster_size_;
        const std::uint64_t end = r.end == disk_size() ? round_up(r.end) / cluster_size_ : r.end / cluster_size_;
        return {first, std::max(first, end)};
    }

    ByteRange bytes(ClusterRun run) const { return clip({run.first * cluster_size_, run.end * cluster_size_}); }

    /// How many granules the cluster has: fewer only in the last cluster of the disk.
    std::uint32_t granules(std::uint64_t cluster) const {
        const ByteRange b = bytes({cluster, cluster + 1});
        return static_cast<std::uint32_t>((b.length() + granule_size_ - 1) / granule_size_);
    }

    ByteRange clip(ByteRange r) const { return {std::min(r.begin, disk_size()), std::min(r.end, disk_size())}; }

  private:
    std::uint64_t round_up(std::uint64_t offset) const {
        return (offset + cluster_size_ - 1) / cluster_size_ * cluster_size_;
    }

    std::atomic<std::uint64_t> disk_size_;
    const std::uint32_t cluster_size_;
    const std::uint32_t granule_size_;
};

} // namespace qlean
