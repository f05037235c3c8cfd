// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The L2 tables of the active image in memory, in slices of up to 4 KiB. A slice is known by what it describes (guest
// clusters), not by where it lives in the file, so a table that moves invalidates nothing.
//
// Readers take no lock: slices are recycled but never freed, and a reader that saw a slice being recycled notices by
// its turn and asks again. Whoever changes an entry holds L1 lock(i) shared from pin() to the last store(); whoever
// loads holds it too, so the home of the table cannot change under the read. A slice that is dirty, pinned, or being
// written is never recycled. Only the commit leader copies and writes dirty slices; it writes copies, never the slice.
#pragma once

#include "address.h"
#include "claims.h"
#include "file.h"
#include "l1_table.h"
#include "l2_entry.h"
#include "thread_safety.h"

#include <array>
#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <span>
#include <vector>

namespace qlean {

class L2Cache {
    struct Slice;

  public:
    /// `limit`: bytes of clean slices to keep. Dirty ones may exceed it; see dirty_bytes().
    /// `claims`: is told of every slice that is read; null: nothing will be changed.
    L2Cache(const Geometry &geometry, File &file, const SyncLog &syncs, L1Table &l1, std::uint64_t limit,
            Claims *claims);
    static std::uint64_t slice_entries(const Geometry &geometry);
    static std::uint64_t slice_count(const Geometry &geometry);
    ~L2Cache();

    std::uint64_t entries_per_slice() const { return slice_entries_; }
    std::uint64_t slice_of(GuestCluster c) const { return c.value / slice_entries_; }

    /// The L2 entries of guest clusters [first, first + out.size()). The caller holds them in the range lock, or
    /// accepts that they change under it.
    void read(GuestCluster first, std::span<L2Words> out);

    /// As read, but passing by the cache for what it does not hold: for walks over everything, which includes entries
    /// beyond the end of the disk.
    void read_around(GuestCluster first, std::span<L2Words> out);

    /// Keeps a slice in memory for changing its entries. The table must exist.
    class Pin {
      public:
        Pin() = default;
        Pin(Pin &&other) noexcept : cache_(other.cache_), slice_(std::exchange(other.slice_, nullptr)) {}
        Pin &operator=(Pin &&other) noexcept;
        ~Pin();
        /// Sets the entry of `c`, which lies in this slice. Data it points to has been written already.
        void store(GuestCluster c, const L2Words &words);
        L2Words load(GuestCluster c) const;

      private:
        friend class L2Cache;
        Pin(L2Cache *cache, Slice *slice) : cache_(cache), slice_(slice) {}
        L2Cache *cache_ = nullptr;
        Slice *slice_ = nullptr;
    };
    /// Caller holds L1 lock of the table shared (or exclusively), and the table exists.
    Pin pin(std::uint64_t slice);

    std::uint64_t dirty_bytes() const { return dirty_slices_.load(std::memory_order_relaxed) * slice_bytes(); }
    std::uint64_t memory_bytes() const { return slices_made_.load(std::memory_order_relaxed) * slice_bytes(); }

    // For the commit leader.

    /// A piece of a table copied for writing to `at`, big-endian.
    struct Copy {
        HostOffset at;
        std::vector<std::uint64_t> words;
        std::uint64_t needs = 0; ///< the sync that must have completed before this is published
        bool whole_new_table = false;
        std::uint64_t table = 0; ///< L1 index
        std::vector<Slice *> slices;
    };
    /// Copies every dirty slice, and whole each table that is new. The slices stay in memory until done() or failed().
    std::vector<Copy> take_dirty();
    void done(const Copy &copy);
    void failed(const Copy &copy);

    /// The whole of table i as it is now, big-endian. Caller holds L1 lock(i) exclusively.
    std::vector<std::uint64_t> whole_table(std::uint64_t i);
    /// Forgets table i, which was unlinked. Caller holds L1 lock(i) exclusively, and leads.
    void discard_table(std::uint64_t i);

  private:
    static constexpr std::uint64_t no_key = ~std::uint64_t{0};
    static constexpr std::size_t shard_count = 16;

    struct Slice {
        std::atomic<std::uint64_t> key{no_key};
        std::atomic<std::uint64_t> turn{0}; // raised whenever the slice is given up: the same key may come back
        std::unique_ptr<std::atomic<std::uint64_t>[]> words; // host byte order
        mutable Mutex mutex;                                 // orders store() against the leader's copy
        std::atomic<std::uint64_t> stores{0}; // of extended entries, in halves: odd while one is under way
        std::atomic<bool> dirty{false};
        std::atomic<bool> used{false};      // since the clock hand passed
        std::uint64_t needs = 0;            // protected by mutex, once others know the slice
        std::atomic<std::uint32_t> pins{0}; // raised only under the shard's mutex
    };
    struct alignas(64) Shard {
        Mutex mutex;
        std::condition_variable loaded;
        std::vector<std::unique_ptr<Slice>> slices PROTECTED_BY(mutex);
        std::vector<Slice *> free PROTECTED_BY(mutex);
        std::vector<std::uint64_t> loading PROTECTED_BY(mutex); // keys being read from the file
        std::vector<Slice *> dirty PROTECTED_BY(mutex); // each at least once; may hold slices that are clean again
        std::size_t hand PROTECTED_BY(mutex) = 0;
    };

    std::uint64_t slice_words() const { return slice_entries_ * entry_words_; }
    std::uint64_t slice_bytes() const { return slice_words() * 8; }
    std::uint64_t slices_per_table() const { return geometry_.l2_entries() / slice_entries_; }
    std::uint64_t table_of_slice(std::uint64_t key) const { return key / slices_per_table(); }
    Shard &shard(std::uint64_t key) { return shards_[key % shard_count]; }
    HostOffset home(std::uint64_t key) const;

    L2Words entry_of(const Slice &slice, std::uint64_t i) const;
    static L2Words extended_entry_of(const Slice &slice, std::uint64_t i);
    /// Reads entries of one slice without a lock; false if it is not in memory.
    bool peek(std::uint64_t key, std::uint64_t first, std::span<L2Words> out);
    /// The slice in memory, loaded if it must be. Caller holds the table's L1 lock. Returned pinned.
    Slice *load(std::uint64_t key);
    Slice *take_free(Shard &shard) WITH_LOCK(shard.mutex);
    void give_up(Slice &slice);
    void fill_from_file(std::uint64_t key, std::span<std::uint64_t> words);
    void mark_dirty(Slice &slice);
    void copy_slice(Slice &slice, std::uint64_t *to, Copy &copy, std::uint64_t &cleared);
    Slice *pin_if_present(std::uint64_t key);

    Geometry geometry_;
    File &file_;
    const SyncLog &syncs_;
    L1Table &l1_;
    Claims *claims_;
    std::uint64_t entry_words_;
    std::uint64_t slice_entries_;
    std::uint64_t keys_;
    std::uint64_t shard_limit_; // slices
    std::atomic<Slice *> *directory_;
    std::array<Shard, shard_count> shards_;
    std::atomic<std::uint64_t> dirty_slices_{0};
    std::atomic<std::uint64_t> slices_made_{0};
};

} // namespace qlean
