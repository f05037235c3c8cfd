// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Moving tables and other clusters byte for byte, many at once: all copies are durable before the first pointer is
// written, which all are before an old place is given back.
#pragma once

#include "../state.h"

#include <functional>

namespace qlean {

/// Clusters that are adjacent in both places.
struct WholeMove {
    HostRun from;
    Allocator::Reservation to;
};

/// From within a task of WriteBack::lead(). `switch_over` is told where each begins now and writes what points there;
/// durable when this returns.
void carry_out(State &state, std::vector<WholeMove> &moves,
               const std::function<void(const std::vector<HostCluster> &to)> &switch_over);

} // namespace qlean
