// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The persistent bitmaps of an open image: where their parts are, and keeping the enabled ones right while the guest
// writes (docs/interop/qcow2, "Bitmaps"). There is such an object only if the image has bitmaps that count (autoclear
// bit 0 set); otherwise what the header extension says is not to be relied on, and nothing of it is looked at.
//
// A bitmap that is enabled and consistent is *tracked*. Before the first change of the disk the flag in_use of each is
// durable in the directory: from then on its stored bits do not count, and if the process dies they never will again.
// What the guest changes is marked in memory before it is changed. A clean close sets these bits in the file as well,
// in place (nobody relies on them), and clears in_use when they are durable. Bitmaps that are disabled or inconsistent
// already keep every byte.
#pragma once

#include "allocator.h"
#include "bitmap_directory.h"
#include "claims.h"
#include "dirty_bits.h"
#include "header_home.h"
#include "refcounts.h"
#include "thread_safety.h"
#include "write_back.h"

#include <atomic>
#include <functional>
#include <memory>
#include <optional>

namespace qlean {

class Bitmaps {
  public:
    /// Nothing if the image has no bitmaps that count. Reads and judges directory and tables, as QEMU does; `end`:
    /// clusters of the file.
    static std::optional<BitmapDirectory> read(File &file, const Header &header, std::uint64_t end);
    /// `metadata`: what else is in use, whatever refcounts say.
    Bitmaps(BitmapDirectory directory, const Geometry &geometry, File &file, HeaderHome &header, Refcounts &refcounts,
            Allocator &allocator, WriteBack &write_back, Claims &claims, EachRun metadata);

    /// To be called after WriteBack::before_change() and before anything of the range changes, with no lock held.
    /// The first call makes in_use durable.
    void mark(GuestOffset at, std::uint64_t length) {
        if (!begun_.load(std::memory_order_acquire))
            begin();
        for (Tracked &t : tracked_)
            t.bits.set(at.value >> t.granularity_bits, (at.value + (length - 1)) >> t.granularity_bits);
    }
    /// At a clean end, when nothing changes any more: the tracked bitmaps are right in the file again. False: they
    /// were.
    bool store();
    // For a disk that is resized, while nothing else is running.

    /// Throws Error if the bitmaps do not allow it, as QEMU does.
    void require_resizable(const Geometry &wanted) const;
    /// What changes meanwhile is not marked.
    void pause(bool paused) { paused_ = paused; }
    /// Tables as long as this disk wants, of consistent bitmaps whose table is too short; these are inconsistent until
    /// tables_grown(), to be called when the file has the new size. As leader; `reserve` gives adjacent clusters.
    std::vector<std::size_t> grow_tables(const std::function<Allocator::Reservation(std::uint64_t)> &reserve);
    void tables_grown(const std::vector<std::size_t> &grown);

    /// Called with the reason if the bitmaps had to be given up.
    void on_problem(std::function<void(const std::exception &)> report) { report_ = std::move(report); }

    // --- for walks and moves: as the leader, except runs()

    /// False once the bitmaps were given up: nothing of them counts any more.
    bool count() const { return !given_up_; }
    /// Directory, tables and stored clusters. Skips what is damaged.
    void each_run(const VisitRun &visit) const;
    /// A sentence about the first table (of a bitmap that is inconsistent anyway) that makes no sense, if there is one.
    std::optional<std::string> damage() const;

    /// As it is in the file.
    BitmapDirectory directory() const {
        const Lock guard(mutex_);
        return {directory_, directory_bytes_, entries_};
    }
    std::size_t size() const {
        const Lock guard(mutex_);
        return entries_.size();
    }
    /// A copy: the leader may be moving it.
    BitmapEntry entry(std::size_t i) const;
    HostRun table_run(const BitmapEntry &entry) const {
        return {geometry_.cluster_of(entry.table), geometry_.clusters_for(entry.table_bytes())};
    }
    HostRun directory_run() const;
    /// In host byte order; empty if the table lies beyond the end of the file.
    std::vector<std::uint64_t> read_table(const BitmapEntry &entry) const;

    // Each makes the file point at another home whose content is durable; the caller makes the change durable.
    void switch_directory(HostOffset home);
    void switch_table(std::size_t i, HostOffset home);
    void switch_stored(std::size_t i, const std::vector<std::pair<std::uint64_t, HostCluster>> &words);

  private:
    struct Tracked {
        std::size_t entry;
        unsigned granularity_bits;
        DirtyBits bits;
    };

    void begin();
    void begin_as_leader();
    /// Where the entry is in the file.
    HostOffset entry_home(std::size_t i) const;
    /// In the file, durably, and then in memory. As leader.
    void set_in_use(const std::vector<std::size_t> &which, bool in_use);
    std::vector<std::size_t> tracked_entries() const;
    std::optional<std::string> unsafe() const;
    void give_up(const std::string &why);
    void store_as_leader();
    void store_bits(const Tracked &tracked, std::vector<Allocator::Reservation> &reserved,
                    std::vector<std::pair<std::uint64_t, HostCluster>> &words);
    Allocator::Reservation reserve(std::uint64_t count);

    Geometry geometry_;
    File &file_;
    HeaderHome &header_;
    Refcounts &refcounts_;
    Allocator &allocator_;
    WriteBack &write_back_;
    Claims &claims_;
    EachRun metadata_;
    std::function<void(const std::exception &)> report_;

    Mutex begin_mutex_; // nothing else held; leads within
    std::atomic<bool> begun_{false};
    bool paused_ = false;
    bool claimed_ = false;         // what they have is known to claims_
    std::vector<Tracked> tracked_; // made by begin(), and let go by store(), beside which nothing is marked
    std::atomic<bool> given_up_{false};

    mutable Mutex mutex_; // only the leader changes what it protects
    HostOffset directory_ PROTECTED_BY(mutex_);
    std::uint64_t directory_bytes_ PROTECTED_BY(mutex_) = 0;
    std::vector<BitmapEntry> entries_ PROTECTED_BY(mutex_); // as many as there were at first
};

} // namespace qlean
