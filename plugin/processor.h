// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The processor that this thread runs on, or did a moment ago: what all requests would write to is split by it, so that
// processors do not take a cache line from each other. By thread would not do: there are more of them, and they move.
#pragma once

#include <algorithm>
#include <cstddef>
#include <sched.h>

namespace qlean::plugin {

inline std::size_t processor() { return static_cast<std::size_t>(std::max(sched_getcpu(), 0)); }

} // namespace qlean::plugin
