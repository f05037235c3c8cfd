// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Commits: the only writer of metadata, in the one order that a power cut cannot hurt.
//
//   copy: retired list, L1 runs, L2 slices, words of snapshots' tables, refcount increments (the publisher before what
//         it relies on)
//   1. refcounts and new tables (and the decrements an earlier commit made safe)   → sync
//   2. L2 slices, L1 runs, words                                                    → sync
//   3. giving back: decrements of what 2 unlinked → sync → those clusters are free
//
// There is one leader at a time. A flush that arrives after the leader has begun to copy joins the next round;
// all that arrive in between share it. A failed sync poisons the image: no write is accepted after it.
#pragma once

#include "allocator.h"
#include "header_home.h"
#include "l1_table.h"
#include "l2_cache.h"
#include "refcounts.h"
#include "snapshots.h"
#include "thread_safety.h"

#include <functional>

namespace qlean {

class WriteBack {
  public:
    WriteBack(const Geometry &geometry, bool read_only, File &file, SyncLog &syncs, HeaderHome &header, L1Table &l1,
              L2Cache &l2, Snapshots &snapshots, Refcounts &refcounts, Allocator &allocator);

    enum class Give { later, back };
    /// How often whoever finds no room commits, to give back or to link refcount blocks, and tries again.
    static constexpr int max_commits_for_space = 4;
    /// Makes everything that completed before the call durable; with Give::back also frees what was retired by then.
    /// The caller holds no lock. Throws Error if that failed: nothing was lost from memory, and it can be tried again,
    /// unless the image is poisoned.
    void commit(Give give);

    /// Runs `task` as the leader: no commit is under way, and none starts until it returns. Tasks and commits take
    /// turns, so that many of the ones do not keep out the others. No lock held.
    void lead(const std::function<void()> &task);
    /// A commit from within a task of lead().
    void commit_as_leader(Give give);
    /// A sync from within a task of lead(); poisons if it fails.
    void sync_as_leader();
    /// From within a task of lead(): nothing more may be written.
    void poison_as_leader() { poison(); }
    /// From within a task of lead(): `switch_over` makes the file point at another home of a structure; durable when
    /// this returns. If it fails, nobody knows which home counts, and so nothing more may be written: poisons.
    void switch_as_leader(const std::function<void()> &switch_over);
    /// From within a task of lead(): writes all refcounts that changed; not synced.
    void write_refcounts_as_leader();
    /// The last region that should have a refcount block when the file ends at `end`, for a table of `table_clusters`.
    std::uint64_t last_region_wanted(std::uint64_t end, std::uint64_t table_clusters) const;
    /// The last region without whose block a commit links all that are wanted, when the file ends at `end`.
    std::uint64_t last_region_needed(std::uint64_t end) const;
    /// From within a task of lead(): keeps refcount blocks linked ahead of the end of the file, and of `more` clusters
    /// beyond it, so that growth need not wait for a commit.
    void link_ahead(std::uint64_t more = 0);
    /// From within a task of lead(): the L1 table gets a new home in `room`, which is adjacent, as the file has it
    /// (what is dirty stays so), with room for `entries`; durable when this returns. If that is more than before, the
    /// parts have to be made anew.
    void move_l1_as_leader(Allocator::Reservation room, std::uint64_t entries);

    /// To be called before anything of the image changes, with no lock held. Throws Error if it may not change. The
    /// first call makes durable that features which we do not keep up (autoclear bits) are no longer to be relied on.
    void before_change();
    /// The image has changed, or may have, since it was opened.
    bool changed() const { return changed_.load(std::memory_order_relaxed); }
    /// Autoclear features that are kept up, and so stay set. Before anything changes.
    void keep_up(std::uint64_t autoclear_bits) { kept_up_ |= autoclear_bits; }
    /// Throws Error if the image is poisoned.
    void require_healthy() const;
    bool poisoned() const { return poisoned_.load(std::memory_order_acquire); }
    /// Called once, when the image becomes poisoned.
    void on_poison(std::function<void()> call) { on_poison_ = std::move(call); }

    std::uint64_t commits() const { return completed_.load(std::memory_order_relaxed); }
    double last_commit_ms() const { return last_ms_.load(std::memory_order_relaxed); }
    /// Something changed since the last commit began.
    bool anything_to_commit() const;

  private:
    struct Round;

    void run(Give give);
    void write_table(const L2Cache::Copy &copy);
    void write_first(const Round &round);
    void publish(const Round &round);
    void lower_unlinked();
    void settle_lowered();
    void apply_increments();
    std::uint64_t margin(std::uint64_t table_clusters) const;
    void link_regions(const std::vector<std::uint64_t> &regions);
    void link_beyond(std::uint64_t first_region, std::uint64_t count);
    std::vector<std::byte> new_block(std::uint64_t counted) const;
    std::uint64_t autoclear_to_clear() const { return header_.autoclear() & ~kept_up_; }
    void sync();
    void poison();

    Geometry geometry_;
    const bool read_only_;
    std::once_flag first_change_;
    std::atomic<bool> changed_{false};
    std::uint64_t kept_up_ = 0;
    File &file_;
    SyncLog &syncs_;
    HeaderHome &header_;
    L1Table &l1_;
    L2Cache &l2_;
    Snapshots &snapshots_;
    Refcounts &refcounts_;
    Allocator &allocator_;

    Mutex mutex_;
    std::condition_variable led_;
    bool leading_ PROTECTED_BY(mutex_) = false;
    bool give_back_next_ PROTECTED_BY(mutex_) = false;
    unsigned commits_waiting_ PROTECTED_BY(mutex_) = 0, tasks_waiting_ PROTECTED_BY(mutex_) = 0;
    bool task_was_last_ PROTECTED_BY(mutex_) = false; ///< to lead, not a round
    std::uint64_t started_ PROTECTED_BY(mutex_) = 0;
    std::uint64_t succeeded_ PROTECTED_BY(mutex_) = 0; ///< newest round that succeeded
    std::uint64_t gave_back_ PROTECTED_BY(mutex_) = 0; ///< newest round that succeeded and gave back
    std::atomic<std::uint64_t> completed_{0};
    std::exception_ptr failure_ PROTECTED_BY(mutex_); ///< of round completed_, if it failed
    std::atomic<double> last_ms_{0};

    // Leader only.
    std::vector<HostRun> unlinked_;        ///< unlinked durably, refcount not lowered yet
    std::vector<HostRun> lowered_, freed_; ///< refcount lowered in memory; of these, what came to zero
    std::atomic<bool> poisoned_{false};
    std::function<void()> on_poison_;
};

} // namespace qlean
