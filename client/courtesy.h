// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// How fast to work beside a guest: as fast as its requests do not take noticeably longer for it. Learns from samples of
// the guest's latency and of what was achieved meanwhile, and answers with a rate: steps up while the guest does not
// notice, half when it does, never below a floor. Noticing is two samples in a row, for a p99 over a second or two is a
// noisy number.
// Time and samples are passed in, never taken: the arithmetic can be tested without waiting.
#pragma once

#include "units.h"

#include <cstdint>
#include <optional>

namespace qlean {

class Courtesy {
  public:
    static constexpr std::uint64_t first_rate = 16 * mebibyte; // bytes per second
    static constexpr std::uint64_t floor_rate = 4 * mebibyte;
    // The guest notices what is both: so many times its p99 without us, and so much more.
    static constexpr double tolerance = 1.25;
    static constexpr double slack_us = 50;

    // Before any work: what the guest has without us, or nothing if there is none.
    void learn_baseline(std::optional<double> p99_us);
    // While working, about twice a second. `p99_us`: of the guest's requests in the last second or so; nothing if it
    // made none. `achieved`: bytes per second that we handled since the last sample.
    void sample(std::optional<double> p99_us, std::uint64_t achieved);

    // Bytes per second; nothing: there is nobody to be considerate of.
    std::optional<std::uint64_t> rate() const { return rate_; }

  private:
    bool noticed(double p99_us) const { return p99_us > *baseline_ * tolerance && p99_us > *baseline_ + slack_us; }
    void learn_at_floor(double p99_us);
    void slow_down();

    std::optional<double> baseline_;
    std::optional<std::uint64_t> rate_;
    std::uint64_t achieved_ = 0; // smoothed
    int noticed_ = 0;            // samples in a row
    unsigned at_floor_ = 0;      // samples since which the floor is all we take, and the guest is slow
    double slowest_at_floor_ = 0;
};

} // namespace qlean
