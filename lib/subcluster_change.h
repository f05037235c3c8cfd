// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Storing another bitmap for a cluster, and letting go of its host cluster when nothing is left in it.
#pragma once

#include "state.h"
#include "subcluster_mapping.h"

namespace qlean::subclusters {

/// Gives cluster `c`, which has `mapping`, the bitmap `after`. The host cluster stays while something is in it, or if
/// `keep_host`; else the references that go with it are added to `freed`. Whether there is one now.
bool set_subclusters(State &state, Mapper::Editor &editor, GuestCluster c, const Mapping &mapping, Bitmap after,
                     bool keep_host, std::vector<HostRun> &freed);

/// A host cluster that was used before keeps the host's space for what nobody wrote now: everything outside of `used`.
void punch_all_but(State &state, HostCluster host, Set used);

} // namespace qlean::subclusters
