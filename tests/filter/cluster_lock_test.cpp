// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The cluster lock: exclusion, sharing, that a writer gets past overlapping readers, and that overlapping runs which
// wrap around the stripes don't deadlock.

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "filter/cluster_lock.h"
#include "tests/catch.h"

using namespace qlean;
using Mode = ClusterLocks::Mode;
using namespace std::chrono_literals;

TEST_CASE("An exclusive holder excludes everybody on its clusters and nobody elsewhere") {
    ClusterLocks locks;
    std::atomic<int> inside{0};
    std::thread same, other;
    {
        const ClusterLocks::Hold hold(locks, {10, 20}, Mode::exclusive);
        same = std::thread([&] {
            const ClusterLocks::Hold h(locks, {19, 21}, Mode::shared);
            inside += 1;
        });
        other = std::thread([&] {
            const ClusterLocks::Hold h(locks, {20, 30}, Mode::exclusive);
            inside += 100;
        });
        other.join();
        std::this_thread::sleep_for(50ms);
        CHECK(inside == 100);
    }
    same.join();
    CHECK(inside == 101);
}

TEST_CASE("Shared holders share") {
    ClusterLocks locks;
    const ClusterLocks::Hold hold(locks, {0, 5000}, Mode::shared);
    std::thread([&] { const ClusterLocks::Hold h(locks, {4, 5}, Mode::shared); }).join();
    SUCCEED();
}

TEST_CASE("A waiting writer gets in past readers that always overlap") {
    WriterPreferringLock lock;
    std::atomic<bool> stop{false};
    std::vector<std::thread> readers;
    for (int i = 0; i < 8; i++)
        readers.emplace_back([&] {
            while (!stop) {
                lock.lock_shared();
                std::this_thread::sleep_for(300us);
                lock.unlock_shared();
            }
        });
    std::this_thread::sleep_for(20ms);
    const auto begin = std::chrono::steady_clock::now();
    for (int i = 0; i < 20; i++) {
        lock.lock();
        lock.unlock();
    }
    const auto took = std::chrono::steady_clock::now() - begin;
    stop = true;
    for (auto &r : readers)
        r.join();
    CHECK(took < 2s);
}

TEST_CASE("Overlapping runs neither deadlock nor let two writers in") {
    ClusterLocks locks;
    // One plain counter per cluster, so that a lock that fails shows as a lost count (and as a race to a sanitizer).
    std::vector<long> counters(3000);
    std::vector<std::vector<long>> mine(4, std::vector<long>(3000));
    std::vector<std::thread> threads;
    for (unsigned t = 0; t < 4; t++)
        threads.emplace_back([&, t] {
            unsigned random = t * 7919 + 1;
            for (int i = 0; i < 3000; i++) {
                random = random * 1664525 + 1013904223;
                const std::uint64_t first = (random >> 8) % 2900;
                const std::uint64_t end = first + 1 + (random >> 20) % 100;
                const bool exclusive = random & 0x80;
                const ClusterLocks::Hold hold(locks, {first, end}, exclusive ? Mode::exclusive : Mode::shared);
                if (exclusive)
                    for (std::uint64_t c = first; c < end; c++)
                        counters[c]++, mine[t][c]++;
            }
        });
    for (auto &t : threads)
        t.join();
    for (std::size_t c = 0; c < counters.size(); c++)
        REQUIRE(counters[c] == mine[0][c] + mine[1][c] + mine[2][c] + mine[3][c]);
}
