// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Threads in the order of their first request: what all requests would write to is split by it, so that they do not
// take a cache line from each other.
#pragma once

#include <atomic>
#include <cstddef>

namespace qlean::plugin {

inline std::size_t thread_number() {
    static std::atomic<std::size_t> next{0};
    thread_local const std::size_t mine = next.fetch_add(1, std::memory_order_relaxed);
    return mine;
}

} // namespace qlean::plugin
