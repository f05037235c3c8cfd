// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Leaky-bucket arithmetic on one time point.
#include "pace.h"

#include <algorithm>

namespace qlean {

Pace::Clock::time_point Pace::due(std::uint64_t bytes, Clock::time_point now) const {
    const std::chrono::duration<double> price(static_cast<double>(bytes) / static_cast<double>(*rate_));
    const auto cost = std::chrono::duration_cast<Clock::duration>(price);
    // What costs more than a second is paid for by waiting for longer than that: else it would never be.
    const auto catch_up = std::max<Clock::duration>(std::chrono::seconds(1), cost);
    return std::max(paid_until_, now - catch_up) + cost;
}

Pace::Clock::duration Pace::delay(std::uint64_t bytes, Clock::time_point now) const {
    if (!rate_) {
        return Clock::duration::zero();
    }
    return std::max(due(bytes, now) - now, Clock::duration::zero());
}

void Pace::sent(std::uint64_t bytes, Clock::time_point now) {
    if (rate_) {
        paid_until_ = due(bytes, now);
    }
}

} // namespace qlean
