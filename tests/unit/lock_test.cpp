// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The two locks: RwLock, which prefers writers, and RangeLock over stripes of the disk.
#include "lib/range_lock.h"
#include "lib/rw_lock.h"
#include "tests/catch.h"
#include "tests/fault/scene.h"

#include <random>
#include <shared_mutex>
#include <thread>

using namespace qlean;
using namespace qlean::fault;
using namespace std::chrono_literals;

TEST_CASE("A writer excludes everybody, readers share") {
    RwLock lock;
    lock.lock_shared();
    CHECK(lock.try_lock_shared());
    CHECK_FALSE(lock.try_lock());
    lock.unlock_shared();
    CHECK_FALSE(lock.try_lock());
    lock.unlock_shared();
    REQUIRE(lock.try_lock());
    CHECK_FALSE(lock.try_lock());
    CHECK_FALSE(lock.try_lock_shared());
    lock.unlock();
    CHECK(lock.try_lock_shared());
    lock.unlock_shared();
}

TEST_CASE("A writer gets in under readers that overlap all the time") {
    RwLock lock;
    std::atomic<bool> stop{false};
    std::vector<std::thread> readers;
    for (int i = 0; i < 4; ++i)
        readers.emplace_back([&] {
            while (!stop) {
                const std::shared_lock guard(lock);
                std::this_thread::sleep_for(200us);
            }
        });
    std::this_thread::sleep_for(20ms);
    std::chrono::steady_clock::duration longest{};
    for (int i = 0; i < 20; ++i) {
        const auto began = std::chrono::steady_clock::now();
        const std::lock_guard guard(lock);
        longest = std::max(longest, std::chrono::steady_clock::now() - began);
    }
    stop = true;
    for (auto &reader : readers)
        reader.join();
    CHECK(longest < 1s); // a lock that prefers readers starves it for seconds
}

TEST_CASE("A reader that comes after a waiting writer waits behind it") {
    RwLock lock;
    lock.lock_shared();
    Beside writer;
    writer.start([&] {
        lock.lock();
        lock.unlock();
    });
    while (lock.try_lock_shared()) { // until the writer has announced itself
        lock.unlock_shared();
        std::this_thread::sleep_for(1ms);
    }
    CHECK_FALSE(writer.finished(20ms));
    lock.unlock_shared();
    writer.join();
    CHECK(lock.try_lock_shared());
    lock.unlock_shared();
}

TEST_CASE("What a lock protects is never seen half-way") {
    RwLock lock;
    std::uint64_t a = 0, b = 0;
    std::atomic<int> torn{0};
    std::vector<std::thread> threads;
    for (int i = 0; i < 3; ++i)
        threads.emplace_back([&, i] {
            for (int n = 0; n < 3000; ++n) {
                if ((n + i) % 4 == 0) {
                    const std::lock_guard guard(lock);
                    ++a;
                    ++b;
                } else {
                    const std::shared_lock guard(lock);
                    torn += a != b;
                }
            }
        });
    for (auto &thread : threads)
        thread.join();
    CHECK(torn == 0);
    CHECK(a == 3 * 750);
}

TEST_CASE("Ranges that overlap exclude each other, others do not") {
    const Geometry g(16, 4, std::uint64_t{1} << 40);
    RangeLock ranges(g);
    const RangeLock::Exclusive held(ranges, {10 * 65536}, 3 * 65536);
    const auto can = [&](std::uint64_t at, std::uint64_t length) {
        return RangeLock::Exclusive(ranges, {at}, length, std::try_to_lock).owns();
    };
    CHECK_FALSE(can(12 * 65536 + 65535, 1));
    CHECK_FALSE(can(0, 11 * 65536));
    CHECK(can(13 * 65536, 65536));
    CHECK(can(0, 10 * 65536));
    CHECK(can(9 * 65536, 65536)); // what a failed attempt took it gave back
}

TEST_CASE("C5: stripes are taken each once: ranges around the end of the stripes, longer than all, of small clusters") {
    for (const unsigned bits : {9u, 16u, 21u}) {
        const Geometry g(bits, 4, std::uint64_t{1} << 45);
        RangeLock ranges(g);
        const std::uint64_t unit = std::uint64_t{1} << std::max(bits, 16u), all = RangeLock::stripe_count * unit;
        for (const auto &[at, length] :
             std::vector<std::pair<std::uint64_t, std::uint64_t>>{{0, all},
                                                                  {0, 3 * all},
                                                                  {all - unit, 2 * unit},
                                                                  {unit / 2, all},
                                                                  {5 * all - 1, 2},
                                                                  {1, 1},
                                                                  {7 * unit, all - unit},
                                                                  {all - 2 * unit, all - unit}}) {
            INFO("at " << at << ", " << length << " bytes");
            { const RangeLock::Exclusive guard(ranges, {at}, length); } // a stripe taken twice would hang here
            { const RangeLock::Shared guard(ranges, {at}, length); }
            const RangeLock::Exclusive again(ranges, {at}, length, std::try_to_lock);
            CHECK(again.owns());
        }
    }
}

TEST_CASE("C5: threads that take any ranges in any order do not deadlock, and exclude each other") {
    const std::uint64_t seed = fresh_seed();
    INFO("QLEAN_SEED=" << seed);
    const Geometry g(16, 4, std::uint64_t{1} << 40);
    RangeLock ranges(g);
    constexpr std::uint64_t units = RangeLock::stripe_count;
    std::vector<std::uint64_t> counters(units); // each changed only under its exclusive lock
    std::atomic<std::uint64_t> expected{0};
    std::vector<std::unique_ptr<Beside>> threads;
    for (unsigned t = 0; t < 4; ++t)
        threads.emplace_back(std::make_unique<Beside>())->start([&, t] {
            std::mt19937_64 random(seed + t);
            for (int n = 0; n < 300; ++n) {
                const std::uint64_t at = random() % (2 * units), count = 1 + random() % (n % 10 ? 40 : units);
                if (random() % 3 == 0) {
                    const RangeLock::Exclusive guard(ranges, {at * 65536}, count * 65536);
                    for (std::uint64_t i = 0; i < std::min(count, units); ++i)
                        ++counters[(at + i) % units];
                    expected += std::min(count, units);
                } else {
                    const RangeLock::Shared guard(ranges, {at * 65536}, count * 65536);
                    volatile std::uint64_t sink = counters[at % units];
                    (void)sink;
                }
            }
        });
    for (auto &thread : threads) {
        REQUIRE(thread->finished(60s));
        thread->join();
    }
    std::uint64_t sum = 0;
    for (const std::uint64_t n : counters)
        sum += n;
    CHECK(sum == expected);
}
