// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The internal snapshots of an open image: which there are, their L1 tables, and what their L2 tables say.
//
// What a snapshot refers to is never written in place and never freed: its clusters are shared (COPIED is clear in the
// active image's entries), and whoever changes the active image copies a shared cluster, or a shared L2 table, first
// (Mapper::ensure_table). So what a snapshot's entry says changes for one reason only: the cluster or the table it
// points to has moved. A move of a cluster happens under the exclusive range lock of its guest offset, which is the
// same in every snapshot; a move of a table of L1 index i happens under L1 lock(i), exclusively. Who holds the range
// lock shared may rely on an entry.
//
// L2 tables of snapshots are not cached. Words of theirs that changed and are not in the file yet are in `pending`,
// also where the table is the active image's too.
//
// lock(), shared: no snapshot appears or goes, and no table that one has moves. It comes before leadership, and so
// before everything else.
#pragma once

#include "header.h"
#include "l1_table.h"
#include "pending_words.h"
#include "rw_lock.h"
#include "snapshot_table.h"
#include "thread_safety.h"

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace qlean {

/// One snapshot, with its L1 table in memory.
class Snapshot {
  public:
    Snapshot(SnapshotEntry entry, std::vector<std::uint64_t> l1_words, std::uint64_t image_size);

    const SnapshotEntry &entry() const { return entry_; }
    std::uint64_t disk_size() const { return disk_size_; }
    std::uint64_t l1_size() const { return l1_size_; }
    /// Changes under L1 lock(i), held exclusively.
    std::uint64_t word(std::uint64_t i) const { return i < l1_size_ ? l1_[i].load(std::memory_order_acquire) : 0; }
    HostOffset table(std::uint64_t i) const { return entry::table(word(i)); }
    void set_word(std::uint64_t i, std::uint64_t word) { l1_[i].store(word, std::memory_order_release); }
    HostOffset l1_home() const { return l1_home_.load(std::memory_order_acquire); }
    void set_l1_home(HostOffset home) { l1_home_.store(home, std::memory_order_release); }
    /// The clusters of the L1 table; none if it has no entries.
    HostRun l1_run(const Geometry &geometry) const {
        return {geometry.cluster_of(l1_home()), geometry.clusters_for(l1_size_ * 8)};
    }

  private:
    SnapshotEntry entry_; // but for where its L1 table is, as it was read
    std::uint64_t disk_size_, l1_size_;
    std::unique_ptr<std::atomic<std::uint64_t>[]> l1_; // host byte order
    std::atomic<HostOffset> l1_home_;
};

using SnapshotPointer = std::shared_ptr<Snapshot>;

class Snapshots {
  public:
    /// As read from a file: the list in the file's order, and where the table is.
    struct Loaded {
        std::vector<SnapshotPointer> list;
        HostOffset home;
        std::uint64_t bytes = 0;
        std::vector<unsigned> users = {}; ///< of each, where they are made anew beside those who use them
    };
    /// Reads and judges the snapshots of an image whose file is `length` bytes long. Throws Error.
    static Loaded load(File &file, const Header &header, std::uint64_t length);

    Snapshots(const Geometry &geometry, File &file, const SyncLog &syncs, L1Table &l1, Loaded loaded);

    /// A table or a cluster of the active image may be shared with a snapshot. Costs nothing to ask.
    bool any() const { return any_.load(std::memory_order_acquire); }
    RwLock &lock() { return lock_; }

    /// What these were made from, as it is now, with those who use them. Nothing is pending.
    Loaded loaded() const;

    std::vector<SnapshotPointer> list() const;
    /// Where the table is in the file, and its length; the leader may move it.
    HostRun table_run() const;
    /// Everything that the snapshots have beside guest clusters, L2 tables included, each as often as it is referred
    /// to.
    void each_metadata_run(const VisitRun &visit) const;

    /// The words (host order) of the entries of [first, first + out.size() / entry_words). Takes L1 locks.
    void read(const Snapshot &snapshot, GuestCluster first, std::span<std::uint64_t> out);

    /// Keeps a snapshot from being deleted while it is read over an export. Nothing if there is none of that name or
    /// id.
    class Use {
      public:
        Use(Use &&other) noexcept : owner_(std::exchange(other.owner_, nullptr)), snapshot_(other.snapshot_) {}
        Use &operator=(Use &&) = delete;
        ~Use();
        Snapshot &operator*() const { return *snapshot_; }
        Snapshot *operator->() const { return snapshot_.get(); }

      private:
        friend class Snapshots;
        Use(Snapshots *owner, SnapshotPointer snapshot) : owner_(owner), snapshot_(std::move(snapshot)) {}
        Snapshots *owner_;
        SnapshotPointer snapshot_;
    };
    /// By name, or else by id.
    std::optional<Use> use(const std::string &name_or_id);
    SnapshotPointer find(const std::string &name_or_id) const;

    // For whoever deletes, as the owner of all moves; what follows these two with lock() held exclusively.
    /// False if it is in use; true: nobody can begin to use it.
    bool close_for_use(const SnapshotPointer &snapshot);
    void reopen_for_use(const SnapshotPointer &snapshot);
    /// The table without `gone`, and with it the addresses of the L1 tables as they are now.
    SnapshotTable table_without(const Snapshot *gone) const;
    /// The file's table is at `home` now, `bytes` long, without `gone`.
    void moved(HostOffset home, std::uint64_t bytes, const Snapshot *gone);
    /// Nothing is shared any more.
    void none_left() { any_.store(false, std::memory_order_release); }

    PendingWords pending;

  private:
    struct Listed {
        SnapshotPointer snapshot;
        unsigned users = 0;
        bool closed = false;
    };
    std::vector<Listed>::iterator position(const std::string &name_or_id) WITH_LOCK(mutex_);

    Geometry geometry_;
    L1Table &l1_;
    std::atomic<bool> any_;
    RwLock lock_;
    mutable Mutex mutex_;
    std::vector<Listed> listed_ PROTECTED_BY(mutex_);
    HostOffset home_ PROTECTED_BY(mutex_);
    std::uint64_t bytes_ PROTECTED_BY(mutex_);
};

} // namespace qlean
