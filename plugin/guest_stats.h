// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// How many requests the guest made and how long they took. Counted in shards, so that processors do not share a
// cache line; read together for the status page.
#pragma once

#include "lib/thread_safety.h"

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>

namespace qlean::plugin {

class GuestStats {
  public:
    enum Kind { read, write, trim, zero, flush, kinds };
    /// Of durations, four for each power of two of nanoseconds: up to 18 minutes.
    static constexpr std::size_t buckets = 160;

    struct Totals {
        std::array<std::uint64_t, kinds> requests{}, bytes{};
        std::array<std::uint64_t, buckets> by_duration{};
        double quantile_us(double q) const;
        std::uint64_t count() const;
    };

    /// Counts one request from construction to destruction.
    class Timer {
      public:
        Timer(GuestStats &stats, Kind kind, std::uint64_t bytes)
            : stats_(stats), kind_(kind), bytes_(bytes), began_(std::chrono::steady_clock::now()) {}
        ~Timer() { stats_.add(kind_, bytes_, std::chrono::steady_clock::now() - began_); }
        Timer(const Timer &) = delete;
        Timer &operator=(const Timer &) = delete;

      private:
        GuestStats &stats_;
        Kind kind_;
        std::uint64_t bytes_;
        std::chrono::steady_clock::time_point began_;
    };

    static std::size_t bucket_of(std::chrono::nanoseconds took);

    Totals totals() const;
    /// What happened since about a second before, or since the last call if that is longer ago.
    Totals recent();

  private:
    void add(Kind kind, std::uint64_t bytes, std::chrono::nanoseconds took);

    static constexpr std::size_t shard_count = 32;
    struct alignas(64) Shard {
        std::array<std::atomic<std::uint64_t>, kinds> requests{}, bytes{};
        std::array<std::atomic<std::uint64_t>, buckets> by_duration{};
    };
    std::array<Shard, shard_count> shards_;

    Mutex mutex_;
    Totals before_ PROTECTED_BY(mutex_), at_last_call_ PROTECTED_BY(mutex_);
    std::chrono::steady_clock::time_point last_call_ PROTECTED_BY(mutex_){};
};

} // namespace qlean::plugin
