// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The rate limiter. Bytes are paid for before they are sent, so at no moment since the start has more been sent than
// the rate allows; time lost to a slow server is caught up, but never more than one second's worth at once, or one
// request's.
// Time is passed in, never read: the arithmetic can be tested without waiting.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>

namespace qlean {

class Pace {
  public:
    using Clock = std::chrono::steady_clock;

    // Without a rate nothing is ever delayed.
    explicit Pace(std::optional<std::uint64_t> bytes_per_second) : rate_(bytes_per_second) {}

    // Forgets what could have been sent until now: waiting between two passes earns no burst.
    void restart(Clock::time_point now) { paid_until_ = now; }

    // How long to wait before `bytes` may go out; zero means now.
    Clock::duration delay(std::uint64_t bytes, Clock::time_point now) const;

    void sent(std::uint64_t bytes, Clock::time_point now);

    // Holds for what is sent from now on.
    void set_rate(std::optional<std::uint64_t> bytes_per_second) { rate_ = bytes_per_second; }

  private:
    Clock::time_point due(std::uint64_t bytes, Clock::time_point now) const;

    std::optional<std::uint64_t> rate_;
    Clock::time_point paid_until_{}; // everything sent so far is paid for by the time up to here
};

} // namespace qlean
