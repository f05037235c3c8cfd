// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "adjacent.h"

#include "error.h"

namespace qlean {

Allocator::Reservation reserve_adjacent(State &state, std::uint64_t count) {
    for (int commits = 0; commits < WriteBack::max_commits_for_space; ++commits) {
        auto reserved = state.allocator.reserve_contiguous(count);
        if (!reserved.empty())
            return reserved;
        state.write_back.link_ahead(count);
        state.write_back.commit_as_leader(WriteBack::Give::back);
    }
    throw Error(Error::Kind::no_space, ENOSPC, fmt::format("'{}' cannot grow any further", state.file.name()));
}

} // namespace qlean
