// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// How long the guest's requests took, as the status page tells it.
#include "tests/catch.h"

#include "plugin/guest_stats.h"

using namespace std::chrono_literals;
using qlean::plugin::GuestStats;

TEST_CASE("A quantile is at most a quarter above the duration it stands for, be it seconds or minutes") {
    for (const std::chrono::nanoseconds took :
         {9ns, 1000ns, 123456ns, 50000000ns, 4200000000ns, 4400000000ns, 600000000000ns}) {
        GuestStats::Totals totals;
        totals.by_duration.at(GuestStats::bucket_of(took)) = 1;
        const double us = std::chrono::duration<double, std::micro>(took).count();
        INFO(us << " us");
        CHECK(totals.quantile_us(1) >= us);
        CHECK(totals.quantile_us(1) <= us * 1.25);
    }
}
