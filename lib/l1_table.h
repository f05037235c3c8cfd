// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The active L1 table in memory, and the life of L2 tables as a whole: which exist, which were linked but not yet
// written, and where the table itself lives.
//
// Entry i changes only under lock(i) held exclusively; holding it shared keeps table i where it is. Which sectors
// differ from the file is remembered; only the commit leader copies and writes them.
#pragma once

#include "address.h"
#include "l2_entry.h"
#include "metadata_guard.h"
#include "rw_lock.h"
#include "thread_safety.h"

#include <atomic>
#include <memory>
#include <unordered_set>
#include <vector>

namespace qlean {

class L1Table {
  public:
    /// A run of changed entries, copied for writing: `words` big-endian, to go to `at`.
    struct DirtyRun {
        std::uint64_t first_sector;
        HostOffset at;
        std::vector<std::uint64_t> words;
    };

    /// `words`: the table as read from the file (big-endian), `home`: where.
    L1Table(std::vector<std::uint64_t> words, HostOffset home);

    std::uint64_t size() const { return size_; }
    std::uint64_t word(std::uint64_t i) const { return entries_[i].load(std::memory_order_acquire); }
    /// Where L2 table i is; 0 if there is none.
    HostOffset table(std::uint64_t i) const { return entry::table(word(i)); }
    RwLock &lock(std::uint64_t i) { return locks_[i % lock_count].lock; }

    /// Links a table that has not been written. Caller holds lock(i) exclusively.
    void link_new(std::uint64_t i, HostOffset table);
    /// Points at a table whose whole content is at `table` already. Caller holds lock(i) exclusively; unless it leads,
    /// the old table stays as it is as long as a commit may be writing there (it is shared).
    void relink(std::uint64_t i, HostOffset table);
    /// The same for a table that snapshots have too: it stays one that must be copied before it changes.
    void relink_shared(std::uint64_t i, HostOffset table);
    /// Nobody else has table i any more. Caller holds lock(i) exclusively.
    void set_copied(std::uint64_t i);
    /// Removes the table. Caller holds lock(i) exclusively, and leads.
    void unlink(std::uint64_t i);

    /// Table i was linked, but nothing of it is in the file yet: what the cache does not hold is zero.
    bool is_new(std::uint64_t i) const;
    std::vector<std::uint64_t> new_tables() const;
    void written(std::uint64_t i);

    /// From now on `guard` knows this table and those it points to. Before anybody else uses it. False if it
    /// knew a part of them already.
    bool guard_with(MetadataGuard &guard, std::uint64_t table_bytes);

    // For the commit leader.
    std::vector<DirtyRun> take_dirty();
    void put_back(const std::vector<DirtyRun> &runs);
    bool dirty() const { return dirty_count_.load(std::memory_order_acquire) != 0; }
    HostOffset home() const { return home_.load(std::memory_order_acquire); }
    /// The clusters it lies in; none of an empty table.
    HostRun run(const Geometry &geometry) const {
        return {geometry.cluster_of(home()), geometry.clusters_for(size_ * 8)};
    }
    void set_home(HostOffset home);

  private:
    static constexpr std::uint64_t sector_words = 64; // 512 bytes: what a disk writes whole
    static constexpr std::uint64_t lock_count = 256;
    struct alignas(64) PaddedLock {
        RwLock lock;
    };

    void set(std::uint64_t i, std::uint64_t word) WITH_LOCK(mutex_);

    std::uint64_t size_;
    std::unique_ptr<std::atomic<std::uint64_t>[]> entries_; // host byte order
    std::unique_ptr<PaddedLock[]> locks_;
    std::atomic<HostOffset> home_; // changed by the leader
    MetadataGuard *guard_ = nullptr;
    std::uint64_t table_bytes_ = 0; ///< of an L2 table

    mutable Mutex mutex_;
    std::vector<bool> dirty_ PROTECTED_BY(mutex_); // per sector
    std::unordered_set<std::uint64_t> new_ PROTECTED_BY(mutex_);
    std::atomic<std::uint64_t> dirty_count_{0};
};

} // namespace qlean
