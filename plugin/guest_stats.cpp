// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "guest_stats.h"

#include "processor.h"

#include <bit>
#include <functional>
#include <thread>

namespace qlean::plugin {

namespace {

double upper_bound_us(std::size_t bucket) {
    const auto power = bucket / 4, quarter = bucket % 4;
    return static_cast<double>(std::uint64_t{1} << power) * (1.0 + static_cast<double>(quarter + 1) / 4) / 1000;
}

GuestStats::Totals difference(GuestStats::Totals a, const GuestStats::Totals &b) {
    for (std::size_t k = 0; k < a.requests.size(); ++k) {
        a.requests[k] -= b.requests[k];
        a.bytes[k] -= b.bytes[k];
    }
    for (std::size_t i = 0; i < a.by_duration.size(); ++i)
        a.by_duration[i] -= b.by_duration[i];
    return a;
}

} // namespace

std::size_t GuestStats::bucket_of(std::chrono::nanoseconds took) {
    const auto ns = static_cast<std::uint64_t>(took.count());
    if (ns < 8)
        return 0;
    const auto power = static_cast<unsigned>(std::bit_width(ns)) - 1;
    return std::min<std::size_t>(power * 4 + (ns >> (power - 2) & 3), buckets - 1);
}

void GuestStats::add(Kind kind, std::uint64_t bytes, std::chrono::nanoseconds took) {
    Shard &shard = shards_[processor() % shard_count];
    shard.requests[kind].fetch_add(1, std::memory_order_relaxed);
    shard.bytes[kind].fetch_add(bytes, std::memory_order_relaxed);
    shard.by_duration[bucket_of(took)].fetch_add(1, std::memory_order_relaxed);
}

GuestStats::Totals GuestStats::totals() const {
    Totals sum;
    for (const Shard &shard : shards_) {
        for (std::size_t k = 0; k < kinds; ++k) {
            sum.requests[k] += shard.requests[k].load(std::memory_order_relaxed);
            sum.bytes[k] += shard.bytes[k].load(std::memory_order_relaxed);
        }
        for (std::size_t i = 0; i < sum.by_duration.size(); ++i)
            sum.by_duration[i] += shard.by_duration[i].load(std::memory_order_relaxed);
    }
    return sum;
}

GuestStats::Totals GuestStats::recent() {
    const auto now = std::chrono::steady_clock::now();
    const Totals current = totals();
    const Lock guard(mutex_);
    if (now - last_call_ >= std::chrono::seconds(1)) {
        before_ = at_last_call_;
        at_last_call_ = current;
        last_call_ = now;
    }
    return difference(current, before_);
}

std::uint64_t GuestStats::Totals::count() const {
    std::uint64_t n = 0;
    for (const auto i : by_duration)
        n += i;
    return n;
}

double GuestStats::Totals::quantile_us(double q) const {
    const auto wanted = static_cast<double>(count()) * q;
    double seen = 0;
    for (std::size_t i = 0; i < by_duration.size(); ++i) {
        seen += static_cast<double>(by_duration[i]);
        if (by_duration[i] != 0 && seen >= wanted)
            return upper_bound_us(i);
    }
    return 0;
}

} // namespace qlean::plugin
