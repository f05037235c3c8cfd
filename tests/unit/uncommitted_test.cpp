// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The bound of the extra space: never more than the limit, with threads that fail to move and commits that fail.
#include "../catch.h"
#include "lib/compact/uncommitted.h"

#include <atomic>
#include <chrono>
#include <future>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

using qlean::Uncommitted;

TEST_CASE("Uncommitted: never beyond the limit, one gives back at a time, and nothing is lost count of") {
    constexpr std::uint64_t limit = 16;
    std::atomic<std::uint64_t> taken{0}, moved{0};
    std::atomic<int> giving{0}, together{0}, beyond{0}, failed{0}, refused{0};
    std::mt19937 luck(99);
    bool may_fail = true;
    Uncommitted uncommitted([&] {
        together += giving++ != 0;
        const std::uint64_t given = moved.exchange(0);
        std::this_thread::yield();
        --giving;
        if (may_fail && luck() % 8 == 0) {
            ++refused;
            moved += given;
            throw std::runtime_error("no");
        }
        taken -= given;
    });
    std::vector<std::thread> threads;
    for (unsigned n = 0; n < 8; ++n)
        threads.emplace_back([&, n] {
            std::mt19937 random(n);
            for (int i = 0; i < 3000; ++i)
                try {
                    const std::uint64_t bytes = 1 + random() % 3;
                    auto share = uncommitted.take(bytes, limit);
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
    CHECK(failed <= refused); // somebody is told, once
    {
        Uncommitted::Return returning(uncommitted);
        returning.done();
    }
    CHECK_FALSE(uncommitted.any_moved());
    // All of it is there again, and the failure before the last return is no longer anybody's.
    may_fail = false;
    (void)uncommitted.take(limit, limit);
}

TEST_CASE("Uncommitted: a move larger than the limit is let through alone") {
    std::atomic<int> gave_back{0};
    Uncommitted uncommitted([&] { ++gave_back; });
    uncommitted.take(1, 16).moved();
    {
        auto large = uncommitted.take(100, 16);
        CHECK(gave_back == 1);
        large.moved();
    }
    (void)uncommitted.take(1, 16);
    CHECK(gave_back == 2);
}

TEST_CASE("Uncommitted: below the limit moves go on while what has moved is given back") {
    std::promise<void> went_on;
    std::atomic<int> gave_back{0};
    Uncommitted uncommitted([&] {
        if (gave_back++ == 0)
            went_on.get_future().wait();
    });
    uncommitted.take(12, 16).moved();
    while (gave_back == 0)
        std::this_thread::yield();
    uncommitted.take(4, 16).moved();
    went_on.set_value();
    uncommitted.take(16, 16).moved();
    CHECK(gave_back >= 2);
}

TEST_CASE("Uncommitted: a failure in the background goes to the next who moves, and is tried again after that") {
    std::atomic<int> tried{0};
    Uncommitted uncommitted([&] {
        if (++tried == 1)
            throw std::runtime_error("no room");
    });
    uncommitted.take(16, 16).moved();
    CHECK_THROWS_AS(uncommitted.take(1, 16), std::runtime_error);
    uncommitted.take(1, 16).moved();
    CHECK(tried == 2);
}

TEST_CASE("Uncommitted: stopped while it gives back, it waits, and keeps count of the rest") {
    std::promise<void> second_moved;
    std::atomic<bool> gives_back{false}, ended{false};
    Uncommitted uncommitted([&] {
        gives_back = true;
        second_moved.get_future().wait();
        std::this_thread::sleep_for(std::chrono::milliseconds(20)); // stop() comes in between, if it can
        ended = true;
    });
    uncommitted.take(12, 16).moved();
    while (!gives_back)
        std::this_thread::yield();
    uncommitted.take(4, 16).moved(); // not worth a return of its own
    second_moved.set_value();
    uncommitted.stop();
    CHECK(ended);
    CHECK(uncommitted.any_moved());
}
