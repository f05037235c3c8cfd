// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// One move of one guest cluster, behind the guest's back: warm the source unlocked, try the guest cluster's lock,
// check that it still maps to the source, copy, store the new entry, unlock, retire the source. A guest that wants the
// cluster waits for no more than the copy of one cached cluster.
#pragma once

#include "../state.h"

#include <functional>
#include <optional>

namespace qlean {

enum class Moved {
    yes,
    contended, ///< the guest is using it: come back later
    gone,      ///< it no longer maps to the source: nothing to do
};

/// Moves guest cluster `c` from `source` to `destination`, which is reserved and becomes the image's if the answer is
/// yes. A cluster kept for zeroes only is let go without using `destination`: then *used is false.
Moved relocate(State &state, GuestCluster c, HostCluster source, const Allocator::Extent &destination, bool *used);

/// The same, to the first cluster of `room`, which must not be empty. A move may need space on the host before it gives
/// any back: on a full disk `give_back` makes what was moved so far give it, and it is tried once more. Where it went,
/// or nothing: it did not move, and `room` has the clusters that it had.
std::optional<Allocator::Extent> relocate_into(State &state, GuestCluster c, HostCluster source,
                                               Allocator::Reservation &room, const std::function<void()> &give_back);

} // namespace qlean
