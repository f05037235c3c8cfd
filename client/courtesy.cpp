// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "courtesy.h"

#include <algorithm>

namespace qlean {

namespace {

// Slow at the floor for that long is the guest's own doing: what it has now is what it has without us.
constexpr unsigned patience = 4;

} // namespace

void Courtesy::sample(std::optional<double> p99_us) {
    if (!p99_us) {
        rate_.reset();
        return;
    }
    if (!rate_) {
        rate_ = first_rate; // somebody is there now
    }
    if (!baseline_) {
        // It came while we were at full speed. At the floor we learn what it is used to.
        rate_ = floor_rate;
        if (++slow_at_floor_ >= patience) {
            baseline_ = *p99_us;
            slow_at_floor_ = 0;
        }
        return;
    }
    if (*p99_us > *baseline_ * tolerance) {
        if (*rate_ == floor_rate && ++slow_at_floor_ >= patience) {
            baseline_ = *p99_us;
            slow_at_floor_ = 0;
        }
        rate_ = std::max(*rate_ / 2, floor_rate);
        return;
    }
    slow_at_floor_ = 0;
    baseline_ = std::min(*baseline_, (*baseline_ + *p99_us) / 2);
    rate_ = *rate_ + std::max(*rate_ / 4, mebibyte);
}

} // namespace qlean
