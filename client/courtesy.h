// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// How fast to work beside a guest: as fast as its requests do not take noticeably longer for it. Learns from samples of
// the guest's latency and answers with a rate; additive steps up, halving on the way down, never below a floor.
// Time and samples are passed in, never taken: the arithmetic can be tested without waiting.
#pragma once

#include <cstdint>
#include <optional>

namespace qlean {

class Courtesy {
  public:
    static constexpr std::uint64_t mebibyte = 1048576;
    static constexpr std::uint64_t first_rate = 32 * mebibyte; // bytes per second
    static constexpr std::uint64_t floor_rate = 2 * mebibyte;
    static constexpr double tolerance = 1.25; // of the guest's p99 without us

    // `p99_us`: of the guest's requests in the last second or so; nothing if it made none.
    // Before any work: what the guest has without us.
    void learn_baseline(std::optional<double> p99_us) { baseline_ = p99_us; }
    // While working, about twice a second.
    void sample(std::optional<double> p99_us);

    // Bytes per second; nothing: there is nobody to be considerate of.
    std::optional<std::uint64_t> rate() const { return rate_; }

  private:
    std::optional<double> baseline_;
    std::optional<std::uint64_t> rate_;
    unsigned slow_at_floor_ = 0; // samples in a row
};

} // namespace qlean
