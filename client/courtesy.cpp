// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "courtesy.h"

#include <algorithm>

namespace qlean {

namespace {

constexpr int enough = 2; // samples in a row
// The server counts over one to two seconds: samples after a change still show what was before it. So many are left out
// before the rate is halved again, and before something is learned, which had better be true.
constexpr int stale = 1;
constexpr unsigned all_stale = 4;
// Slow at the floor for that long is the guest's own doing: what it has now is what it has without us.
constexpr unsigned patience = all_stale + 4;
// A guest that becomes faster is believed slowly: the quickest of many noisy samples is not what it is used to.
constexpr double belief = 1.0 / 8;

} // namespace

void Courtesy::learn_baseline(std::optional<double> p99_us) {
    baseline_ = p99_us;
    if (p99_us) {
        rate_ = first_rate;
    }
}

void Courtesy::sample(std::optional<double> p99_us, std::uint64_t achieved) {
    achieved_ = (achieved_ + achieved) / 2;
    if (!p99_us) {
        rate_.reset();
        noticed_ = 0;
        return;
    }
    if (!baseline_) {
        // It came while we were at full speed. At the floor we learn what it is used to.
        rate_ = floor_rate;
        learn_at_floor(*p99_us);
        return;
    }
    if (!rate_) {
        rate_ = first_rate; // it is back
    }
    if (noticed(*p99_us)) {
        if (*rate_ == floor_rate) {
            learn_at_floor(*p99_us);
        } else {
            slow_down();
        }
        return;
    }
    noticed_ = 0;
    at_floor_ = 0;
    slowest_at_floor_ = 0;
    baseline_ = *baseline_ - std::max(*baseline_ - *p99_us, 0.0) * belief;
    // Room to grow, but no more than can be taken back by halving once: where the storage sets the pace, a rate far
    // above it would be no limit any more.
    const std::uint64_t ceiling = std::max(first_rate, 2 * achieved_);
    rate_ = std::max(*rate_, std::min(*rate_ + std::max(*rate_ / 4, mebibyte), ceiling));
}

void Courtesy::slow_down() {
    if (++noticed_ < enough) {
        return;
    }
    noticed_ = -stale;
    rate_ = std::max(std::min(*rate_, std::max(achieved_, floor_rate)) / 2, floor_rate);
}

void Courtesy::learn_at_floor(double p99_us) {
    if (++at_floor_ > all_stale) {
        slowest_at_floor_ = std::max(slowest_at_floor_, p99_us);
    }
    if (at_floor_ < patience) {
        return;
    }
    baseline_ = slowest_at_floor_;
    at_floor_ = 0;
    slowest_at_floor_ = 0;
    noticed_ = 0;
}

} // namespace qlean
