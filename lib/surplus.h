// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Counts that are higher than the references, and by how much: what a crash leaves of what was shared. They are lowered
// as if references were given up one after another. As each takes a little memory until a commit, there is a commit
// after so many of them; it lowers those of one cluster at once.
#pragma once

#include "allocator.h"

#include <functional>
#include <utility>
#include <vector>

namespace qlean {

class Surplus {
  public:
    bool empty() const { return counts_.empty(); }
    /// The count of `c` is too high by `times`. False, and left out: altogether that would be more than a crash leaves,
    /// which finds 32 MiB moved and not committed at the most.
    bool add(HostCluster c, std::uint64_t times) {
        if (times > most - total_)
            return false;
        total_ += times;
        if (times > 0)
            counts_.emplace_back(c, times);
        return true;
    }
    /// Leaves out clusters for which f(cluster) holds.
    template <class F>
    void drop_if(F &&f) {
        std::erase_if(counts_, [&](const auto &count) { return f(count.first); });
    }
    /// Retires all of it; what the last `commit` does not make durable, the next one does. No lock held that a commit
    /// wants.
    void retire(Allocator &allocator, const std::function<void()> &commit) const {
        std::vector<HostRun> runs;
        for (const auto &[cluster, times] : counts_)
            for (std::uint64_t i = 0; i < times; ++i) {
                runs.push_back({cluster, 1});
                if (runs.size() == batch) {
                    allocator.retire(std::exchange(runs, {}));
                    commit();
                }
            }
        allocator.retire(runs);
    }

  private:
    /// A deletion that was killed leaves one for each cluster of the snapshot: this is a TiB in clusters of 64 KiB.
    static constexpr std::uint64_t most = std::uint64_t{1} << 24;
    static constexpr std::size_t batch = 65536;

    std::vector<std::pair<HostCluster, std::uint64_t>> counts_;
    std::uint64_t total_ = 0;
};

} // namespace qlean
