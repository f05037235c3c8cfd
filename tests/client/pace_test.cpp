// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The arithmetic of --max-rate, without waiting: test_limits.py measures it by the watch, as exactly as the machine is.
#include "tests/catch.h"

#include "client/pace.h"

#include <chrono>
#include <cmath>
#include <cstdint>
#include <vector>

using qlean::Pace;
using namespace std::chrono_literals;

namespace {

using Seconds = std::chrono::duration<double>;

constexpr Pace::Clock::time_point start{1h};
constexpr std::uint64_t mib = 1024 * 1024;

/// A client that sends as soon as it may, each request `took` after the last at the earliest; when each was sent.
std::vector<double> send(Pace &pace, std::uint64_t bytes, int count, Pace::Clock::duration took = 0s) {
    std::vector<double> times;
    auto now = start;
    for (int i = 0; i < count; ++i) {
        now += pace.delay(bytes, now);
        CHECK(pace.delay(bytes, now) == 0s);
        pace.sent(bytes, now);
        times.push_back(Seconds(now - start).count());
        now += took;
    }
    return times;
}

Pace begun(std::uint64_t rate) {
    Pace pace(rate);
    pace.restart(start);
    return pace;
}

} // namespace

TEST_CASE("A rate is exact, however large a request is beside it") {
    for (const std::uint64_t rate : {16 * 1024 * std::uint64_t{1}, mib, 37 * mib + 1, 1000 * mib})
        for (const std::uint64_t bytes : {std::uint64_t{4096}, mib, 8 * mib}) {
            CAPTURE(rate, bytes);
            Pace pace = begun(rate);
            const std::vector<double> sent = send(pace, bytes, 50);
            const double price = static_cast<double>(bytes) / static_cast<double>(rate);
            for (std::size_t i = 0; i < sent.size(); ++i) // paid for before it is sent
                CHECK(std::abs(sent[i] - static_cast<double>(i + 1) * price) < 1e-6 * static_cast<double>(i + 1));
        }
}

TEST_CASE("What a slow server has cost is caught up with, a second's worth at most") {
    Pace pace = begun(8 * mib);
    pace.sent(mib, start + 500ms);
    CHECK(pace.delay(mib, start + 500ms) == 0s); // a quarter of a second is paid for, half of one is over
    Pace late = begun(8 * mib);
    const auto now = start + 100s;
    int at_once = 0;
    for (; late.delay(mib, now) == 0s; ++at_once)
        late.sent(mib, now);
    CHECK(at_once == 8);
}

TEST_CASE("A request dearer than a second is paid for once") {
    Pace pace = begun(16 * 1024);
    const auto now = start + 100s; // it could have been sent, but not two
    CHECK(pace.delay(64 * 1024, now) == 0s);
    pace.sent(64 * 1024, now);
    CHECK(pace.delay(64 * 1024, now) == 4s);
}

TEST_CASE("Waiting between two passes earns no burst, and without a rate there is no wait") {
    Pace pace = begun(mib);
    pace.restart(start + 100s);
    CHECK(pace.delay(mib, start + 100s) == 1s);
    pace.set_rate({});
    CHECK(pace.delay(1000 * mib, start + 100s) == 0s);
    pace.sent(1000 * mib, start + 100s); // costs nothing later either
    pace.set_rate(mib);
    CHECK(pace.delay(mib, start + 100s) == 1s);
}

TEST_CASE("A server that is as slow as the rate does not lower it") {
    Pace pace = begun(mib);
    const std::vector<double> sent = send(pace, mib / 4, 100, 245ms);
    CHECK(std::abs(sent.back() - 25.0) < 0.3);
}
