// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The refcounts of an image (docs/interop/qcow2, "Host cluster management"): the refcount table in memory, and the
// blocks in slices of up to 4 KiB that the commit leader loads, changes and writes.
//
// Only the commit leader changes anything here. Other threads may read counts (read_block, for the free map); they
// hold the home lock shared, so that no block moves or is half written under their read.
#pragma once

#include "address.h"
#include "file.h"
#include "metadata_guard.h"
#include "refcount_block.h"
#include "rw_lock.h"

#include <functional>
#include <map>
#include <memory>
#include <vector>

namespace qlean {

class Refcounts {
  public:
    /// `table`: the refcount table as read from `home` (big-endian).
    Refcounts(const Geometry &geometry, File &file, std::vector<std::uint64_t> table, HostOffset home);

    /// Clusters per block, hence per entry of the table; a region is what one block describes.
    std::uint64_t region_clusters() const { return geometry_.refcounts_per_block(); }
    std::uint64_t region_of(HostCluster c) const { return c.value / region_clusters(); }

    /// Block of region r is in the durable table: its clusters may be handed out.
    bool linked(std::uint64_t region) const;
    /// The counts of region r as they are in the file, one by one to `each(index, count)`. Any thread.
    void read_block(std::uint64_t region, const std::function<void(std::uint64_t, std::uint64_t)> &each);

    /// More than one was counted on `c` when its region was first asked about, and still is. Any thread; reads a block
    /// once. A cluster that is given out after the opening is never among these.
    bool was_shared(HostCluster c);

    /// The table: where it is, how long; the blocks it points to, by region. Any thread.
    HostOffset home() const;
    std::uint64_t table_entries() const;
    std::uint64_t table_clusters() const { return geometry_.clusters_for(table_entries() * 8); }
    HostRun table_run() const { return {geometry_.cluster_of(home()), table_clusters()}; }
    std::vector<std::pair<std::uint64_t, HostCluster>> blocks() const;

    // For the commit leader.
    std::uint64_t get(HostCluster c);
    /// Adds one to each cluster of the run. Throws Error on overflow, with nothing changed.
    void increment(HostRun run);
    /// Takes `times` from each, as if one after another; gives the clusters that came to zero. A count that is zero
    /// already is left alone.
    std::vector<HostRun> decrement(HostRun run, std::uint64_t times = 1);
    /// Counts changed since the last write_dirty().
    bool dirty() const { return dirty_count_ != 0; }
    /// Writes every changed slice to the file; not synced.
    void write_dirty();

    /// The words of the table, big-endian, from entry `first`.
    std::vector<std::uint64_t> table_words(std::uint64_t first, std::uint64_t count) const;

    /// Points region r at a block (or at none: 0) whose content is in the file already. In memory only: the caller
    /// makes the table durable before it lets anybody rely on it.
    void set_block(std::uint64_t region, HostOffset block);
    /// The table moved to `home`, with `entries` entries (existing ones kept, new ones zero).
    void set_table(HostOffset home, std::uint64_t entries);

    /// From now on `guard` knows the table and the blocks. Before anybody else uses this. False if it knew a
    /// part of them already.
    bool guard_with(MetadataGuard &guard);

    /// Held exclusively while bytes of blocks or the table's homes change.
    RwLock &home_lock() { return home_lock_; }

  private:
    struct Slice {
        std::vector<std::byte> bytes;
        bool dirty = false;
    };

    std::uint64_t slice_counts() const { return (slice_bytes_ * 8) >> geometry_.refcount_order(); }
    Slice &slice(HostCluster c);
    void mark_dirty(Slice &slice);
    HostOffset slice_home(std::uint64_t key) const;
    [[noreturn]] void throw_unlinked(HostCluster c) const;

    Geometry geometry_;
    File &file_;
    std::uint64_t slice_bytes_;
    mutable RwLock home_lock_;
    std::vector<std::uint64_t> table_; // host byte order; protected by home_lock_ for all but the leader
    HostOffset home_;
    std::map<std::uint64_t, Slice> slices_; // leader only; by cluster / slice_counts()
    std::uint64_t dirty_count_ = 0;
    MetadataGuard *guard_ = nullptr;
    const std::uint64_t first_regions_; // of the table as it was at the opening
    SparseBits asked_;                  // regions
    SparseBits shared_;                 // clusters of these
};

} // namespace qlean
