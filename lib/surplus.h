// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Counts that are higher than the references are lowered as if references were given up one after another. As each
// takes a little memory until a commit, there is a commit after so many of them.
#pragma once

#include "allocator.h"

#include <functional>
#include <utility>
#include <vector>

namespace qlean {

/// By how much the count of a cluster is too high.
struct Surplus {
    HostCluster cluster;
    std::uint64_t times;
};

/// More than this in one image is no trace of a crash, which finds 32 MiB moved and not committed at the most.
constexpr std::uint64_t max_surplus = std::uint64_t{1} << 24;

/// Retires them; what the last commit did not make durable, the next one does. No lock held that a commit wants.
inline void retire_surplus(Allocator &allocator, const std::vector<Surplus> &surplus,
                           const std::function<void()> &commit) {
    constexpr std::size_t batch = 65536;
    std::vector<HostRun> runs;
    for (const Surplus &s : surplus)
        for (std::uint64_t i = 0; i < s.times; ++i) {
            runs.push_back({s.cluster, 1});
            if (runs.size() == batch) {
                allocator.retire(std::exchange(runs, {}));
                commit();
            }
        }
    allocator.retire(runs);
}

} // namespace qlean
