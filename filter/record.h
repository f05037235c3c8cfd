// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// What the guest has thrown away piece by piece: for each cluster touched, which of its granules were discarded or
// hold zeroes. A marked granule may be made to read as zeroes at any time; nothing else may ever be marked.
//
// The record is bounded: when it is full it forgets, which costs space but never data. Its own mutexes make each call
// atomic; that what it says is still true of the disk is the cluster lock's business, held by the caller.

#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>

#include "filter/geometry.h"
#include "lib/thread_safety.h"

namespace qlean {

class Record {
  public:
    static constexpr std::size_t smallest_memory = 64 << 10;

    struct Totals {
        std::uint64_t recorded_bytes = 0; ///< marked
        std::uint64_t ready_bytes = 0;    ///< marked, in clusters marked from end to end
    };

    /// Clusters marked from end to end, all of one kind.
    struct Ready {
        ClusterRun clusters;
        bool must_read_zero; ///< some of it is zeroes the guest wrote: a discard alone would not do
    };

    /// `geometry` outlives this.
    Record(const Geometry &geometry, std::size_t memory);

    /// The guest may have written anything here: forget every granule touched.
    void written(ByteRange range);

    /// The guest no longer cares for this range. Only whole granules count.
    void discarded(ByteRange range) noexcept { mark(range, false); }

    /// The range holds zeroes which must still read as zeroes. Only whole granules count.
    void zeroed(ByteRange range) noexcept { mark(range, true); }

    /// Nothing left to give back in these clusters.
    void forget(ClusterRun run) { written(geometry_.bytes(run)); }

    /// The first run of ready clusters in the given one, at most longest clusters of it.
    std::optional<Ready> next_ready(ClusterRun within, std::uint64_t longest) const;

    Totals totals() const;
    std::size_t memory_used() const;

  private:
    /// The granules of one cluster. Clusters of up to 64 granules, the common ones, need no second allocation.
    struct Marks {
        std::uint64_t few = 0;
        std::unique_ptr<std::uint64_t[]> many;
        std::uint32_t marked = 0;
        bool must_read_zero = false;
    };
    using Clusters = std::map<std::uint64_t, Marks>;

    struct Shard {
        mutable Mutex mutex;
        Clusters clusters PROTECTED_BY(mutex);
        std::uint64_t next_victim PROTECTED_BY(mutex) = 0;
        std::uint64_t marked_granules PROTECTED_BY(mutex) = 0;
        std::uint64_t ready_granules PROTECTED_BY(mutex) = 0;
    };

    // Neighbouring clusters share a shard, so that a long range takes few mutexes.
    static constexpr std::size_t shard_count = 16;
    static constexpr unsigned block_shift = 10;

    void mark(ByteRange range, bool must_read_zero) noexcept;
    void mark_cluster(Shard &shard, std::uint64_t cluster, ByteRange range, bool must_read_zero) WITH_LOCK(shard.mutex);
    void clear_granules(Shard &shard, Clusters::iterator at, ByteRange range) WITH_LOCK(shard.mutex);
    Clusters::iterator erase(Shard &shard, Clusters::iterator at) WITH_LOCK(shard.mutex);
    bool make_room(Shard &shard, std::uint64_t keep) WITH_LOCK(shard.mutex);
    bool complete(const Clusters::value_type &entry) const;
    std::uint32_t change(Marks &marks, std::uint32_t first, std::uint32_t end, bool set) const;

    template <typename F>
    void each_block(ClusterRun run, F f) const NOT_FOLLOWED; // f's shard is the one that is locked
    Shard &shard_of(std::uint64_t cluster) const { return shards_[(cluster >> block_shift) % shard_count]; }

    const Geometry &geometry_;
    std::uint32_t words_; ///< words of Marks::many, 0 if Marks::few is enough
    std::size_t entry_bytes_;
    std::size_t shard_capacity_;
    mutable std::array<Shard, shard_count> shards_;
    /// Clusters recorded in all shards: lets a guest that never discards skip the mutexes. Whoever marked a cluster
    /// held its cluster lock exclusively, so a later holder of that lock sees the count that includes it.
    std::atomic<std::size_t> entries_{0};
};

} // namespace qlean
