// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The bound of the extra space: never more than the limit, with threads that fail to move and commits that fail.
#include "../catch.h"
#include "lib/compact/uncommitted.h"

#include <atomic>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

using qlean::Uncommitted;

TEST_CASE("Uncommitted: never beyond the limit, one gives back at a time, and nothing is lost count of") {
    constexpr std::uint64_t limit = 16;
    Uncommitted uncommitted;
    std::atomic<std::uint64_t> taken{0}, moved{0};
    std::atomic<int> giving{0}, together{0}, beyond{0}, failed{0};
    std::vector<std::thread> threads;
    for (unsigned n = 0; n < 8; ++n)
        threads.emplace_back([&, n] {
            std::mt19937 random(n);
            const auto give_back = [&] {
                together += giving++ != 0;
                const std::uint64_t given = moved.exchange(0);
                std::this_thread::yield();
                --giving;
                if (random() % 8 == 0) {
                    moved += given;
                    throw std::runtime_error("no");
                }
                taken -= given;
            };
            for (int i = 0; i < 3000; ++i)
                try {
                    const std::uint64_t bytes = 1 + random() % 3;
                    auto share = uncommitted.take(bytes, limit, give_back);
                    beyond += (taken += bytes) > limit;
                    if (random() % 64 == 0)
                        std::this_thread::yield();
                    if (random() % 4 == 0) {
                        taken -= bytes;
                        continue;
                    }
                    moved += bytes;
                    share.moved();
                } catch (const std::runtime_error &) {
                    ++failed;
                }
        });
    for (auto &thread : threads)
        thread.join();
    CHECK(beyond == 0);
    CHECK(together == 0);
    CHECK(failed > 0);
    {
        Uncommitted::Return returning(uncommitted);
        returning.done();
    }
    CHECK_FALSE(uncommitted.any_moved());
    // All of it is there again.
    int asked = 0;
    (void)uncommitted.take(limit, limit, [&] { ++asked; });
    CHECK(asked == 0);
}

TEST_CASE("Uncommitted: a move larger than the limit is let through alone") {
    Uncommitted uncommitted;
    bool gave_back = false;
    uncommitted.take(1, 16, [] {}).moved();
    uncommitted.take(100, 16, [&] { gave_back = true; }).moved();
    CHECK(gave_back);
    CHECK(uncommitted.any_moved());
}

TEST_CASE("Uncommitted: below the limit the others go on while one gives back") {
    Uncommitted uncommitted;
    uncommitted.take(12, 16, [] {}).moved();
    bool other_went_on = false;
    (void)uncommitted.take(1, 16, [&] {
        std::thread([&] {
            (void)uncommitted.take(4, 16, [] { FAIL("two give back"); });
            other_went_on = true;
        }).join();
    });
    CHECK(other_went_on);
}
