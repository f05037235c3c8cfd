// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// A complete walk of everything that refers to host clusters, beside the running guest, and what compaction needs to
// know from it. Compaction does not trust refcounts: it moves and cuts nothing before this has compared them.
#pragma once

#include "../references.h"
#include "../surplus.h"
#include "packs.h"

#include <atomic>
#include <optional>
#include <vector>

namespace qlean {

struct Survey {
    std::uint64_t data = 0;       ///< clusters that guest clusters map to
    std::uint64_t compressed = 0; ///< guest clusters that are compressed
    std::uint64_t packs = 0;      ///< clusters that hold their extents
    std::uint64_t metadata = 0;   ///< header, L1, L2, refcount structures
    /// As `qemu-img check` counts: clusters whose predecessor in guest order is not their neighbour in the file, and
    /// all compressed ones.
    std::uint64_t fragmented = 0;
    std::vector<std::uint64_t> empty_tables; ///< L1 indices of L2 tables in which nothing is mapped

    // Only from verify():
    std::vector<HostRun> leaked; ///< a refcount, and no referrer; may be given back, see surplus
    /// Counts above the number of referrers, beside that of `leaked`; as leaked.
    Surplus surplus;
    std::optional<Packs> how_packed; ///< set where there are compressed clusters
    std::vector<HostRun> pinned;     ///< a refcount, and no referrer that is known; stays where it is
    /// Nobody refers to what the file has where there is no refcount block.
    bool uncounted_are_nobodys = false;
    /// Entries of the active image, in L1 or L2, lack COPIED though nobody else refers to what they do: what a crash
    /// leaves.
    bool lacks_copied_flags = false;
};

/// To one compressed extent, at the most: the active image and each snapshot.
inline std::uint64_t most_referrers(const State &state) { return 1 + state.snapshots.list().size(); }

/// Counts, without comparing anything.
Survey survey_image(State &state, const StopCheck &stop);
/// How the packs are filled now, by the active image and snapshots.
Packs survey_packs(State &state, const StopCheck &stop);
/// Counts and compares with the refcounts. Throws Error (bad_image) if a cluster has fewer refcounts than referrers, or
/// is referred to where it must not be. The guest may go on meanwhile. `watch` was begun just now, and must live until
/// what is found is acted upon: what it has touched by then is not what it was. No lock held. Throws Error (stopped)
/// when `stop` says so.
Survey verify_image(State &state, const Allocator::Watch &watch, const StopCheck &stop);

/// Numbers for the status page, kept by whoever knows them. Bytes, or -1 while unknown.
struct Gauges {
    std::atomic<std::int64_t> ideal_end{-1}, pending{-1};
    std::atomic<std::uint64_t> moved_bytes{0}, given_back_bytes{0}, zero_read_bytes{0}, zero_freed_bytes{0};
    std::atomic<std::int64_t> pinned{-1};
};

} // namespace qlean
