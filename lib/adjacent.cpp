// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "adjacent.h"

#include "error.h"

namespace qlean {

namespace {

constexpr int max_commits_for_space = 4;

} // namespace

Allocator::Reservation reserve_adjacent(State &state, std::uint64_t count) {
    for (int commits = 0; commits < max_commits_for_space; ++commits) {
        auto reserved = state.allocator.reserve_contiguous(count);
        if (!reserved.empty())
            return reserved;
        // Not covered by refcount blocks that far.
        std::vector<std::uint64_t> missing;
        const std::uint64_t last =
            state.write_back.last_region_wanted(state.allocator.end() + count, state.refcounts.table_clusters());
        for (std::uint64_t r = state.allocator.end() / state.refcounts.region_clusters(); r <= last; ++r)
            if (!state.refcounts.linked(r))
                missing.push_back(r);
        if (!missing.empty())
            state.write_back.link_regions(missing);
        state.write_back.commit_as_leader(WriteBack::Give::back);
    }
    throw Error(Error::Kind::no_space, ENOSPC, fmt::format("'{}' cannot grow any further", state.file.name()));
}

} // namespace qlean
