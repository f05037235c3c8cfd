// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// How fast to go beside a guest, without a guest.
#include "tests/catch.h"

#include "client/courtesy.h"

using qlean::Courtesy;

TEST_CASE("Without a guest there is no limit") {
    Courtesy courtesy;
    courtesy.learn_baseline({});
    courtesy.sample({});
    CHECK_FALSE(courtesy.rate());
}

TEST_CASE("A guest that does not notice is no reason to wait") {
    Courtesy courtesy;
    courtesy.learn_baseline(100);
    courtesy.sample(100);
    const auto first = courtesy.rate();
    REQUIRE(first);
    for (int i = 0; i < 20; ++i)
        courtesy.sample(120);
    CHECK(*courtesy.rate() > 20 * *first);
}

TEST_CASE("A guest that has to wait halves the rate each time, down to the floor") {
    Courtesy courtesy;
    courtesy.learn_baseline(100);
    courtesy.sample(100);
    const auto before = *courtesy.rate();
    courtesy.sample(200);
    CHECK(*courtesy.rate() == before / 2);
    for (int i = 0; i < 10; ++i)
        courtesy.sample(200);
    CHECK(*courtesy.rate() >= Courtesy::floor_rate);
    CHECK(*courtesy.rate() <= Courtesy::floor_rate * 4);
}

TEST_CASE("A guest that is slow by itself does not hold the work at the floor for good") {
    Courtesy courtesy;
    courtesy.learn_baseline(100);
    for (int i = 0; i < 12; ++i)
        courtesy.sample(1000);
    const auto after = *courtesy.rate();
    for (int i = 0; i < 12; ++i)
        courtesy.sample(1000);
    CHECK(*courtesy.rate() > after);
}

TEST_CASE("A guest that appears later is met slowly, and then as it is used to") {
    Courtesy courtesy;
    courtesy.learn_baseline({});
    courtesy.sample({});
    courtesy.sample(300);
    CHECK(*courtesy.rate() == Courtesy::floor_rate);
    for (int i = 0; i < 20; ++i)
        courtesy.sample(300);
    CHECK(*courtesy.rate() > Courtesy::first_rate);
    courtesy.sample({});
    CHECK_FALSE(courtesy.rate());
}
