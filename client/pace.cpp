// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Leaky-bucket arithmetic on one time point.
#include "pace.h"

#include <algorithm>

namespace qlean {

Pace::Clock::time_point Pace::due(std::uint64_t bytes, Clock::time_point now) const {
    constexpr auto catch_up = std::chrono::seconds(1);
    const auto from = std::max(paid_until_, now - catch_up);
    const std::chrono::duration<double> cost(static_cast<double>(bytes) / static_cast<double>(*rate_));
    return from + std::chrono::duration_cast<Clock::duration>(cost);
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
