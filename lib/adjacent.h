// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Room for a table that needs adjacent clusters, however long it is.
#pragma once

#include "state.h"

namespace qlean {

/// `count` adjacent clusters, at the end of the file if nowhere else. May commit and link refcount blocks. From within
/// a task of WriteBack::lead(). Throws Error (no_space) if the file cannot grow that far.
Allocator::Reservation reserve_adjacent(State &state, std::uint64_t count);

} // namespace qlean
