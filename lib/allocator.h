// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Which host clusters are free, and the one life of a cluster that stops being used:
//
//   InUse → Retired → (unlink durable) → (refcount lowered, durable) → Free → Punching → Free, reading as zeroes
//
// A cluster is handed out only if it is Free, and only where its refcount block is durably linked. Retired clusters
// come back through the commit leader alone. Punching and truncating first withdraw clusters from the free map, work
// outside the mutex, and hand them back. The end of the file is this class's number; fstat is not asked.
//
// One mutex over bitmaps; the free map of a region (what one refcount block describes) is read from the file when it
// is first needed. Sizes are clusters unless they say bytes.
#pragma once

#include "address.h"
#include "file.h"
#include "refcounts.h"
#include "thread_safety.h"

#include <array>
#include <atomic>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

namespace qlean {

class Allocator {
  public:
    /// `guard`: what it has is never made free. `end`: clusters of the file. `in_use`: what is in use whatever
    /// refcounts say.
    Allocator(const Geometry &geometry, File &file, Refcounts &refcounts, const MetadataGuard &guard, std::uint64_t end,
              EachRun in_use);

    struct Extent {
        HostRun run;
        bool zero; ///< the host reads zeroes here
    };

    /// Clusters taken from the free map. What is not published when it dies is retired.
    class [[nodiscard]] Reservation {
      public:
        Reservation() = default;
        Reservation(Reservation &&other) noexcept { *this = std::move(other); }
        Reservation &operator=(Reservation &&other) noexcept;
        ~Reservation();

        bool empty() const { return extents_.empty(); }
        std::uint64_t count() const;
        const std::vector<Extent> &extents() const { return extents_; }
        /// The entries that point here are stored: the clusters belong to the image now.
        void publish();
        /// Takes the first cluster out, as published.
        Extent take_first();
        /// Something was written to the first cluster that nobody refers to: it does not read as zeroes any more.
        void distrust_first() { extents_.front().zero = false; }
        /// The clusters from the first one on that are adjacent, as a reservation of their own.
        Reservation take_adjacent();
        /// `more` comes after the last cluster.
        void append(Reservation more);

      private:
        friend class Allocator;
        Allocator *allocator_ = nullptr;
        std::vector<Extent> extents_;
    };

    /// What to do when nothing is free below the end of the file.
    enum class Growth {
        after_commit, ///< give up if a commit would free a worthwhile amount
        now,          ///< grow the file
    };
    /// Reserves `count` clusters, lowest first, in as few runs as that gives. Empty: commit, giving back, and try
    /// again. Throws Error (no_space) if the host cannot extend the file.
    Reservation reserve(std::uint64_t count, Growth growth);
    /// Up to `count` clusters below `limit` (and not below `floor`), lowest first; never grows the file.
    Reservation reserve_below(std::uint64_t count, HostCluster limit, HostCluster floor = {0});
    enum class Embargo { respected, lifted };
    /// Exactly `count` adjacent clusters below `limit` (and not below `floor`), or none. The only way to get what is
    /// under embargo.
    Reservation reserve_contiguous_below(std::uint64_t count, HostCluster limit, HostCluster floor = {0},
                                         Embargo embargo = Embargo::lifted);

    /// Exactly `count` adjacent clusters anywhere, at the end of a file that grows if need be. Empty: refcount blocks
    /// do not cover that much.
    Reservation reserve_contiguous(std::uint64_t count);

    /// From now on nobody is handed a cluster of `run` (empty: lifted), so that it can be emptied for a table.
    void embargo(HostRun run);

    /// More references to each cluster of `run`, which stay in use until as many are retired. To be followed by touch()
    /// when what refers is stored, unless the clusters are still reserved then.
    void add_references(HostRun run, std::uint64_t times = 1);
    /// What a walk beside this found out about `runs` may be out of date.
    void touch(const std::vector<HostRun> &runs);
    /// One reference less to each cluster: it is no longer in use by something in memory. Whoever relied on it has
    /// finished. A cluster comes free with its last reference.
    void retire(const std::vector<HostRun> &runs);

    std::uint64_t end() const { return end_.load(std::memory_order_acquire); }
    /// End of what durably linked refcount blocks cover without a gap from the region that holds end().
    std::uint64_t covered_end() const;
    /// Whether the last wish to grow was beyond that.
    bool short_of_room() const { return short_of_room_.load(std::memory_order_relaxed); }
    /// Whether no refcount block describes the last cluster of the file.
    bool ends_without_block() const;

    struct Counts {
        std::uint64_t end, free, punching, retired;
        bool complete; ///< every region's free map is known
        /// A cluster that is shared may be retired once for each reference, and so more often than it is there.
        std::uint64_t live() const { return end - free - punching - std::min(retired, end - free - punching); }
    };
    Counts counts() const;
    std::uint64_t retired_bytes() const { return geometry_.bytes(retired_.load(std::memory_order_relaxed)); }
    std::uint64_t waiting_to_punch_bytes() const;
    /// Loads the free map of every region.
    void load_all();
    /// That of the region which the end of the file is in.
    void load_last_region();
    /// In use at or above `from`: the highest such cluster + 1, or `from`.
    HostCluster highest_in_use(HostCluster from) const;
    /// Free clusters below `limit`.
    std::uint64_t free_below(HostCluster limit) const;
    bool is_free(HostCluster c) const;

    // For the commit leader.
    std::vector<HostRun> take_retired();
    void put_back_retired(std::vector<HostRun> runs);
    std::vector<HostRun> take_allocated();
    void put_back_allocated(const std::vector<HostRun> &runs);
    /// The free maps that hold these clusters are loaded: must precede lowering their refcounts.
    void load_regions_of(const std::vector<HostRun> &runs);
    /// `runs` left the retired state; of them `freed` have a durable refcount of 0 and become free.
    void settle(const std::vector<HostRun> &runs, const std::vector<HostRun> &freed);
    /// Extends the file so that [first, first + count), beyond what is covered, is in use; what is skipped is free.
    void claim_beyond(HostCluster first, std::uint64_t count);
    /// Takes the last claim_beyond() back, of which nothing was linked. Not if the file has grown since, as it can
    /// where what comes next has a block already: then that is somebody's, and what was claimed is a leak.
    void unclaim_beyond(HostRun claimed);

    /// Punches up to `max_bytes` of free clusters that still hold host space, and with them what is free in between, up
    /// to as much again; none of it can be handed out meanwhile. False when there was nothing to do.
    bool punch_step(std::uint64_t max_bytes);
    /// Shortens the file by up to `max_bytes` of free tail, but not below `floor`; false when nothing is left to do.
    bool truncate_step(std::uint64_t max_bytes, HostCluster floor);
    /// Clusters of the file in regions that no refcount block describes may be somebody's, if the image lost a block,
    /// and a new block counts them; until a walk has said that they are not. Nobody is given one, so it stays true;
    /// when they get a block they are free then.
    void uncounted_are_nobodys() { nobodys_.store(true, std::memory_order_release); }
    /// At the beginning of a region without a block: those that may be somebody's.
    std::uint64_t uncounted_in_use(std::uint64_t region) const;
    /// All that are nobody's.
    std::uint64_t uncounted() const;
    /// Whether the last cluster of the file is one of them.
    bool ends_uncounted() const;
    /// Shortens the file by up to `max_bytes` of such clusters at its end; false when there are none. For the commit
    /// leader, who alone puts something there.
    bool truncate_uncounted_step(std::uint64_t max_bytes);
    /// Runs `task(end())` while the file's length stays as it is.
    void with_fixed_length(const std::function<void(std::uint64_t)> &task);
    /// Neither reuse nor give anything back from now on.
    void poison() { poisoned_.store(true, std::memory_order_release); }

    /// Records every cluster that is reserved when it begins, and that is taken or retired while it lives: what a walk
    /// of the image beside the guest cannot judge. Any number at once.
    class Watch {
      public:
        explicit Watch(Allocator &allocator);
        ~Watch();
        Watch(const Watch &) = delete;
        Watch &operator=(const Watch &) = delete;
        /// What was recorded so far, by host cluster.
        std::vector<bool> touched() const;
        bool touched(HostCluster c) const;

      private:
        friend class Allocator;
        Allocator &allocator_;
        std::vector<bool> touched_; // protected by the allocator's mutex
    };

  private:
    /// Memory is used for what was set: an image may have very many clusters, of which nobody asks. Bits beyond the new
    /// end must be clear before it shrinks.
    class Bits {
      public:
        void resize(std::uint64_t n) {
            words_ = divide_up(n, 64);
            pages_.resize(divide_up(words_, page_words));
        }
        bool get(std::uint64_t i) const { return word(i / 64) >> (i % 64) & 1; }
        void set(std::uint64_t i) {
            auto &page = pages_[i / 64 / page_words];
            if (!page)
                page = std::make_unique<Page>();
            (*page)[i / 64 % page_words] |= std::uint64_t{1} << (i % 64);
        }
        void clear(std::uint64_t i) {
            if (auto &page = pages_[i / 64 / page_words])
                (*page)[i / 64 % page_words] &= ~(std::uint64_t{1} << (i % 64));
        }
        std::uint64_t word(std::uint64_t w) const {
            const auto &page = pages_[w / page_words];
            return page ? (*page)[w % page_words] : 0;
        }
        std::uint64_t words() const { return words_; }

      private:
        static constexpr std::uint64_t page_words = 512;
        using Page = std::array<std::uint64_t, page_words>;
        std::uint64_t words_ = 0;
        std::vector<std::unique_ptr<Page>> pages_;
    };

    std::uint64_t regions() const { return divide_up(end_, refcounts_.region_clusters()); }
    void take_lowest(std::uint64_t count, std::uint64_t limit, std::vector<Extent> &extents, std::uint64_t floor = 0)
        WITH_LOCK(mutex_);
    void take(std::uint64_t c, std::vector<Extent> &extents) WITH_LOCK(mutex_);
    void untake(std::vector<Extent> &extents) WITH_LOCK(mutex_);
    void add_free(std::uint64_t c, bool zero) WITH_LOCK(mutex_);
    void note(HostRun run) WITH_LOCK(mutex_);
    void no_longer_reserved(HostRun run) WITH_LOCK(mutex_);
    void resize_maps(std::uint64_t end) WITH_LOCK(mutex_);
    bool worth_a_commit() const WITH_LOCK(mutex_);
    std::optional<std::uint64_t> unloaded_region() const WITH_LOCK(mutex_);

    void load_region(std::uint64_t region);
    bool grow(std::uint64_t count);
    Reservation finish(std::vector<Extent> extents) WITH_LOCK(mutex_);
    void bridge(std::vector<HostRun> &withdrawn, std::uint64_t most) WITH_LOCK(mutex_);
    bool under_embargo(std::uint64_t c) const WITH_LOCK(mutex_) {
        return c >= embargo_.first.value && c < embargo_.end().value;
    }

    Geometry geometry_;
    File &file_;
    Refcounts &refcounts_;
    const MetadataGuard &guard_;
    EachRun in_use_;

    Mutex length_mutex_; // held across every change of the file's length; before mutex_
    Mutex load_mutex_;   // held while a region's free map is read; before mutex_
    mutable Mutex mutex_;
    std::atomic<std::uint64_t> end_;                             // changes under mutex_ and length_mutex_
    Bits free_ PROTECTED_BY(mutex_), zero_ PROTECTED_BY(mutex_); // by cluster, below end_
    Bits reserved_ PROTECTED_BY(mutex_);                         // taken and not published yet
    std::vector<bool> loaded_ PROTECTED_BY(mutex_);
    std::uint64_t next_unloaded_ PROTECTED_BY(mutex_) = 0;
    std::uint64_t lowest_ PROTECTED_BY(mutex_) = 0; // no free cluster below
    std::uint64_t free_count_ PROTECTED_BY(mutex_) = 0, punching_ PROTECTED_BY(mutex_) = 0;
    std::atomic<std::uint64_t> retired_{0};
    std::vector<HostRun> retired_runs_ PROTECTED_BY(mutex_), allocated_runs_ PROTECTED_BY(mutex_);
    std::deque<HostRun> punch_queue_ PROTECTED_BY(mutex_);
    std::uint64_t queued_ PROTECTED_BY(mutex_) = 0;
    std::vector<bool> known_metadata_; // protected by load_mutex_
    HostRun embargo_ PROTECTED_BY(mutex_){};
    std::vector<Watch *> watches_ PROTECTED_BY(mutex_);
    std::atomic<bool> poisoned_{false}, nobodys_{false}, short_of_room_{false};
};

} // namespace qlean
