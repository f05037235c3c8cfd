// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Shortening the image: everything at or beyond the ideal end E moves below it, then the file is cut.
//
// E is what is live, counted in clusters, with the refcount structures that a file of that length needs (a fixpoint).
// Every move goes down (destination < E <= source), so a pass ends. E is set when the connection first asks for a
// plan, after a complete walk of the image, and again after each commit.
#pragma once

#include "layout.h"
#include "maintenance.h"
#include "relocator.h"
#include "repack.h"
#include "snapshot_moves.h"
#include "survey.h"
#include "uncommitted.h"

#include <set>
#include <span>

namespace qlean {

class Compact final : public Maintenance {
  public:
    static constexpr std::uint64_t most_by_request = 32 * 1024 * 1024;

    /// `most`: bytes of clusters that one run() moves. A range with more to move wants to be asked for again.
    Compact(Image &image, MoveOwnership &ownership, Gauges &gauges, std::uint64_t connection,
            std::uint64_t most = most_by_request);
    ~Compact() override;

    std::vector<Planned> plan(GuestOffset at, std::uint64_t length, std::size_t most,
                              const StopCheck &stop = never) override;
    void run(GuestOffset at, std::uint64_t length, const StopCheck &stop) override;
    void commit(const StopCheck &stop) override;

  private:
    static constexpr std::uint64_t batch = 4096; ///< entries that are looked at together

    void prepare(const StopCheck &stop);
    /// The clusters to move of [first, last], and what L2 tables go with them.
    struct Work {
        std::vector<std::pair<GuestCluster, HostCluster>> clusters;
        std::vector<std::pair<GuestCluster, std::uint64_t>> extents; ///< compressed; with their descriptors
        std::vector<std::uint64_t> tables;
    };

    bool table_moves_with(GuestCluster c, const std::vector<Mapping> &mappings, GuestCluster first, HostCluster end);

    bool has_free_tail() const WITH_LOCK(mutex_);
    std::uint64_t live() const WITH_LOCK(mutex_);
    void measure() WITH_LOCK(mutex_);
    void measure_packs(const Packs &packs) WITH_LOCK(mutex_);
    void refresh(const StopCheck &stop);
    /// What is to be done with an entry as of one measurement.
    struct Wanted {
        HostCluster end;                                  ///< nothing stays at or beyond it
        HostCluster site_end;                             ///< below it, what comes free is for compressed extents
        std::shared_ptr<const std::vector<bool>> emptied; ///< nor compressed extents in these
    };
    Wanted wanted(const StopCheck &stop);
    Wanted wanted_now() const WITH_LOCK(mutex_);
    Uncommitted::Share room_for(std::uint64_t bytes, const Wanted &wanted);
    bool to_repack(const Mapping &mapping, const Wanted &wanted) const;
    Work find_work(GuestCluster first, GuestCluster last, const Wanted &want);
    void move_plain(Work &work, const Wanted &want, const StopCheck &stop);
    void move_highest(Work &work, const Wanted &want, const StopCheck &stop);
    std::optional<HostCluster> move_one(GuestCluster cluster, HostCluster source, Allocator::Reservation &room,
                                        const Wanted &want, const StopCheck &stop);
    void move_extents(const Work &work, const Wanted &want, const StopCheck &stop);
    bool repack(GuestCluster c, std::uint64_t descriptor, const Wanted &want);
    Repacker::Outcome move_extent(GuestCluster c, std::uint64_t descriptor, const Wanted &want);
    void move_snapshot_extents(const SnapshotWork &work, const StopCheck &stop);
    void found_no_room(std::span<const std::pair<GuestCluster, std::uint64_t>> extents);
    std::uint64_t taken_out_of_live() const WITH_LOCK(mutex_);
    void look_at_snapshots(const StopCheck &stop) WITH_LOCK(mutex_);
    SnapshotWork take_snapshot_work();
    void has_moved_of_snapshots(std::uint64_t count, std::uint64_t bytes);
    std::unique_lock<RwLock> keep_walks_out();
    std::uint64_t most_uncommitted(HostCluster end) const;
    void settle_on_full_disk(const Layout &layout, const StopCheck &stop);
    void settle_metadata(const Layout &layout, const StopCheck &stop);
    void cut(const StopCheck &stop);
    void retire_leaked(const StopCheck &stop) WITH_LOCK(mutex_);

    Image &image_;
    State &state_;
    MoveOwnership &ownership_;
    Gauges &gauges_;
    const std::uint64_t connection_;
    const std::uint64_t most_; ///< clusters that one request moves
    const std::string name_ = "compact";

    mutable Mutex mutex_; // never held over data I/O by run()
    bool prepared_ PROTECTED_BY(mutex_) = false;
    Layout layout_ PROTECTED_BY(mutex_);
    std::vector<HostRun> leaked_ PROTECTED_BY(mutex_);
    Surplus surplus_ PROTECTED_BY(mutex_);
    std::unique_ptr<Allocator::Watch> watch_ PROTECTED_BY(mutex_); // what happened to these since they were found
    bool lacks_copied_flags_ PROTECTED_BY(mutex_) = false;
    std::set<std::uint64_t> empty_tables_ PROTECTED_BY(mutex_);
    std::uint64_t pinned_ PROTECTED_BY(mutex_) = 0;
    // Where there are compressed clusters; as of the walk that preceded the last plan.
    bool has_packs_ PROTECTED_BY(mutex_) = false;
    unsigned passes_ PROTECTED_BY(mutex_) = 0;        // such walks
    bool packs_changed_ PROTECTED_BY(mutex_) = false; // since that walk
    std::shared_ptr<const std::vector<bool>> emptied_ PROTECTED_BY(mutex_);
    // Clusters in use when all is done, without what Layout::measure takes out.
    std::uint64_t live_goal_ PROTECTED_BY(mutex_) = 0;
    HostCluster site_end_ PROTECTED_BY(mutex_){0};
    std::uint64_t slack_ PROTECTED_BY(mutex_) = 0; // more than the ideal, because there was no room
    // As of the walk that preceded the last plan, less what was taken from it.
    SnapshotWork snapshot_work_ PROTECTED_BY(mutex_);
    bool snapshots_changed_ PROTECTED_BY(mutex_) = false; // since that walk

    Repacker repacker_;
    std::atomic<std::uint64_t> placed_{0}, unplaced_{0}; ///< bytes of extents, and those that found no room since then
    Uncommitted uncommitted_;
};

} // namespace qlean
