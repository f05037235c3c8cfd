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
#include "survey.h"

#include <set>

namespace qlean {

class Compact final : public Maintenance {
  public:
    Compact(Image &image, MoveOwnership &ownership, Gauges &gauges, std::uint64_t connection);
    ~Compact() override;

    std::vector<Planned> plan(GuestOffset at, std::uint64_t length, std::size_t most,
                              const StopCheck &stop = never) override;
    void run(GuestOffset at, std::uint64_t length, const StopCheck &stop) override;
    void commit(const StopCheck &stop) override;

  private:
    void prepare(const StopCheck &stop);
    HostCluster ideal_end(const StopCheck &stop);
    /// The clusters to move of [first, last], and what L2 tables go with them.
    struct Work {
        std::vector<std::pair<GuestCluster, HostCluster>> clusters;
        std::vector<std::uint64_t> tables;
    };
    Work find_work(GuestCluster first, GuestCluster last, HostCluster end);
    bool table_moves_with(GuestCluster c, const std::vector<Mapping> &mappings, GuestCluster first, HostCluster end);
    Moved relocate_on_full_disk(GuestCluster c, HostCluster source, const Allocator::Extent &destination, bool *used);
    void wait_for_room(std::uint64_t bytes);
    void has_returned(std::uint64_t bytes);
    void measure();
    void settle_metadata(const Layout &layout, const StopCheck &stop);
    void cut(const StopCheck &stop);
    void retire_leaked();

    Image &image_;
    State &state_;
    MoveOwnership &ownership_;
    Gauges &gauges_;
    const std::uint64_t connection_;
    const std::string name_ = "compact";

    std::mutex mutex_; // protects what follows; never held over data I/O by run()
    bool prepared_ = false;
    Layout layout_;
    std::vector<HostRun> leaked_;
    std::unique_ptr<Allocator::Watch> watch_; // what happened to leaked_ since it was found
    std::set<std::uint64_t> empty_tables_;
    std::uint64_t pinned_ = 0;

    std::mutex commit_mutex_; // one at a time gives back what was moved
    std::atomic<std::uint64_t> unreturned_{0}; ///< bytes being moved, or moved and their sources not punched yet
    std::atomic<std::uint64_t> moved_{0};      ///< of these, moved; lowered with commit_mutex_ held
};

} // namespace qlean
