// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// What the tests of moves and of compaction share: an image in which everything has to move, and doing so.
#pragma once

#include "tests/fault/scene.h"

namespace qlean::fault {

constexpr std::uint64_t cluster = 512;

/// 512-byte clusters, data at the start with holes in it, all metadata far behind it: everything has to move.
inline ImagePlan metadata_last() {
    ImagePlan plan;
    plan.virtual_size = 4 * 64 * cluster;
    for (std::uint64_t c = 0; c < 4 * 64; c += 3)
        plan.data[c] = 10 + c;
    plan.metadata_at = 600;
    return plan;
}

/// Compacts until nothing is left to do.
inline void compact(Scene &s, const std::function<void()> &between = {}) {
    Compact compact(*s.image, s.ownership, s.gauges, 7);
    for (int pass = 0; pass < 4; ++pass) {
        const auto plan = compact.plan({0}, s.image->size(), 100000);
        for (const auto &p : plan)
            if (p.to_do)
                compact.run(p.at, p.length, never);
        if (between)
            between();
        compact.commit(never);
        if (std::none_of(plan.begin(), plan.end(), [](const auto &p) { return p.to_do; }) && s.gauges.pending == 0)
            return;
    }
}

inline std::string error_of(const std::function<void()> &f) {
    try {
        f();
    } catch (const Error &error) {
        return error.what();
    }
    return {};
}

inline bool contains(const std::string &text, const std::string &part) { return text.find(part) != std::string::npos; }

/// Takes every free cluster and fills it.
inline void use_what_is_free(Scene &s) {
    for (std::uint64_t c = 1; c < 4 * 64; c += 3)
        s.image->write(bytes_of(cluster, 0xff), {c * cluster});
}

} // namespace qlean::fault
