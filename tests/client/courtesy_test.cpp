// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// How fast to go beside a guest, without a guest.
#include "tests/catch.h"

#include "client/courtesy.h"

using qlean::Courtesy;
using qlean::mebibyte;

namespace {

/// `count` samples of that p99, while we achieve what we may, up to what the storage is able to.
void samples(Courtesy &courtesy, int count, double p99_us, std::uint64_t able = 1000 * mebibyte) {
    for (int i = 0; i < count; ++i)
        courtesy.sample(p99_us, std::min(able, courtesy.rate().value_or(able)));
}

} // namespace

TEST_CASE("Without a guest there is no limit") {
    Courtesy courtesy;
    courtesy.learn_baseline({});
    CHECK_FALSE(courtesy.rate());
    courtesy.sample({}, 0);
    CHECK_FALSE(courtesy.rate());
}

TEST_CASE("Beside a guest it begins slowly") {
    Courtesy courtesy;
    courtesy.learn_baseline(100);
    CHECK(courtesy.rate() == Courtesy::first_rate);
}

TEST_CASE("A guest that does not notice is no reason to wait") {
    Courtesy courtesy;
    courtesy.learn_baseline(1000);
    samples(courtesy, 20, 1200);
    CHECK(*courtesy.rate() > 20 * Courtesy::first_rate);
}

TEST_CASE("A guest that has to wait halves the rate, down to the floor") {
    Courtesy courtesy;
    courtesy.learn_baseline(1000);
    const auto before = *courtesy.rate();
    samples(courtesy, 2, 2000);
    CHECK(*courtesy.rate() <= before / 2);
    samples(courtesy, 5, 2000);
    CHECK(*courtesy.rate() == Courtesy::floor_rate);
}

TEST_CASE("A single slow sample is noise, and so is little in microseconds") {
    Courtesy courtesy;
    courtesy.learn_baseline(100);
    for (int i = 0; i < 20; ++i) {
        const auto before = *courtesy.rate();
        samples(courtesy, 1, i % 2 == 0 ? 5000 : 100);
        CHECK(*courtesy.rate() >= before);
    }
    const auto before = *courtesy.rate();
    samples(courtesy, 10, 100 + Courtesy::slack_us);
    CHECK(*courtesy.rate() >= before);
}

TEST_CASE("Noise around what the guest is used to does not end at the floor") {
    Courtesy courtesy;
    courtesy.learn_baseline(1000);
    std::uint64_t sum = 0;
    unsigned noise = 1;
    for (int i = 0; i < 400; ++i) {
        noise = noise * 1103515245 + 12345;
        samples(courtesy, 1, 600 + (noise >> 16) % 800); // 600 to 1400
        sum += *courtesy.rate();
    }
    CHECK(sum / 400 > 2 * Courtesy::first_rate);
}

TEST_CASE("However long the guest is quiet, few halvings bite") {
    Courtesy courtesy;
    courtesy.learn_baseline(1000);
    const auto able = 100 * mebibyte;
    samples(courtesy, 1000, 1000, able);
    CHECK(*courtesy.rate() <= 2 * able);
    samples(courtesy, 2, 3000, able);
    CHECK(*courtesy.rate() <= able / 2 + mebibyte);
}

TEST_CASE("A pause in which nothing is achieved does not slow down") {
    Courtesy courtesy;
    courtesy.learn_baseline(1000);
    samples(courtesy, 50, 1000, 100 * mebibyte);
    const auto before = *courtesy.rate();
    for (int i = 0; i < 5; ++i)
        courtesy.sample(1000, 0);
    CHECK(*courtesy.rate() == before);
}

TEST_CASE("A guest that is slow by itself does not hold the work at the floor for good") {
    Courtesy courtesy;
    courtesy.learn_baseline(100);
    samples(courtesy, 20, 10000);
    const auto after = *courtesy.rate();
    samples(courtesy, 12, 10000);
    CHECK(*courtesy.rate() > 2 * after);
}

TEST_CASE("What is learned at the floor is not what our own work before it did") {
    Courtesy courtesy;
    courtesy.learn_baseline(1000);
    samples(courtesy, 5, 8000); // at the floor now; the next samples still cover the time before
    REQUIRE(*courtesy.rate() == Courtesy::floor_rate);
    samples(courtesy, 3, 8000);
    samples(courtesy, 6, 1500);
    const auto before = *courtesy.rate();
    REQUIRE(before > Courtesy::floor_rate); // 1500 is what it is used to, then
    samples(courtesy, 2, 4000);
    CHECK(*courtesy.rate() < before);
}

TEST_CASE("A guest that appears later is met slowly, and then as it is used to") {
    Courtesy courtesy;
    courtesy.learn_baseline({});
    courtesy.sample({}, 500 * mebibyte);
    samples(courtesy, 1, 300);
    CHECK(*courtesy.rate() == Courtesy::floor_rate);
    samples(courtesy, 25, 300);
    CHECK(*courtesy.rate() > Courtesy::first_rate);
    courtesy.sample({}, 0);
    CHECK_FALSE(courtesy.rate());
}
