// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Words of tables that no cache holds (those of snapshots), changed in memory and not in the file yet.
//
// Whoever reads such a table reads it through read(), and so never sees a word that is older than the last store().
// Words are written by the commit leader alone, in the phase of the L2 entries, each after what it relies on is
// durable. What it has copied and not written stays pending, so an attempt that fails loses nothing. Where a table is
// also the active image's, and so in the L2 cache too, the leader copies and writes the cache's slices first: a word
// that is pending is never older than the slice that was copied before it.
#pragma once

#include "address.h"
#include "file.h"
#include "thread_safety.h"

#include <atomic>
#include <map>
#include <span>
#include <vector>

namespace qlean {

class PendingWords {
  public:
    PendingWords(File &file, const SyncLog &syncs) : file_(file), syncs_(syncs) {}

    /// Sets the word at `at`. Data that it points to has been written already.
    void store(HostOffset at, std::uint64_t word);
    /// The words (host order) from `at` on, as they are now.
    void read(HostOffset at, std::span<std::uint64_t> out);

    bool any_in(HostOffset at, std::uint64_t length) const;
    bool any() const { return count_.load(std::memory_order_acquire) != 0; }

    // For the commit leader.
    struct Copy {
        HostOffset at;
        std::uint64_t word;
        std::uint64_t needs; ///< the sync that must have completed before this is written
        std::uint64_t stamp;
    };
    std::vector<Copy> take() const;
    /// Writes the copies; false if there were none. Not synced.
    bool write(const std::vector<Copy> &copies);
    /// The copies are in the file, durably.
    void done(const std::vector<Copy> &copies);

  private:
    struct Word {
        std::uint64_t word, needs, stamp;
    };

    File &file_;
    const SyncLog &syncs_;
    mutable Mutex mutex_;
    std::map<HostOffset, Word> words_ PROTECTED_BY(mutex_);
    std::uint64_t stamp_ PROTECTED_BY(mutex_) = 0;
    std::atomic<std::uint64_t> count_{0};
};

} // namespace qlean
