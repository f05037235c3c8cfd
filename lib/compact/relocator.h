// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// One move of one guest cluster, behind the guest's back: warm the source unlocked, try the guest cluster's lock,
// check that it still maps to the source, copy, store the new entry, unlock, retire the source. A guest that wants the
// cluster waits for no more than the copy of one cached cluster.
#pragma once

#include "../state.h"

namespace qlean {

enum class Moved {
    yes,
    contended, ///< the guest is using it: come back later
    gone,      ///< it no longer maps to the source: nothing to do
};

/// Moves guest cluster `c` from `source` to `destination`, which is reserved and becomes the image's if the answer is
/// yes. A cluster kept for zeroes only is let go without using `destination`: then *used is false.
Moved relocate(State &state, GuestCluster c, HostCluster source, const Allocator::Extent &destination, bool *used);

} // namespace qlean
