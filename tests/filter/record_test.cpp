// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The record of granules: what adds up to a cluster, what is forgotten, and that it stays within its bounds. The random
// test compares it with a plain array of granules.

#include <random>
#include <vector>

#include "filter/record.h"
#include "tests/catch.h"

using namespace qlean;

namespace {

constexpr std::uint64_t K = 1024;
constexpr std::size_t plenty = 64 << 20;

std::vector<std::uint64_t> ready_clusters(const Record &record, const Geometry &geometry) {
    std::vector<std::uint64_t> found;
    ClusterRun left = geometry.touched({0, geometry.disk_size()});
    while (const auto ready = record.next_ready(left, 3)) {
        REQUIRE(ready->clusters.count() >= 1);
        REQUIRE(ready->clusters.count() <= 3);
        for (std::uint64_t c = ready->clusters.first; c < ready->clusters.end; c++)
            found.push_back(c);
        left.first = ready->clusters.end;
    }
    return found;
}

} // namespace

TEST_CASE("Geometry rounds ranges to clusters") {
    const Geometry g(200 * K + 700, 64 * K);
    CHECK(g.touched({0, 1}).end == 1);
    CHECK(g.touched({64 * K - 1, 64 * K + 1}).count() == 2);
    CHECK(g.touched({5, 5}).empty());
    CHECK(g.touched({300 * K, 400 * K}).empty());
    CHECK(g.covered({1, 128 * K}).first == 1);
    CHECK(g.covered({1, 128 * K}).end == 2);
    CHECK(g.covered({1, 64 * K}).empty());
    SECTION("the end of the disk completes the last cluster") {
        CHECK(g.covered({192 * K, 200 * K + 700}).count() == 1);
        CHECK(g.covered({192 * K, 200 * K + 699}).empty());
        CHECK(g.granules(3) == 3);
        CHECK(g.bytes({3, 4}).end == 200 * K + 700);
    }
    SECTION("clusters smaller than a granule are their own granule") {
        CHECK(Geometry(10 * K, 512).granule_size() == 512);
        CHECK(Geometry(10 * K, 512).granules(0) == 1);
    }
}

TEST_CASE("Pieces add up to a cluster") {
    const Geometry g(1 << 20, 64 * K);
    Record record(g, plenty);
    for (std::uint64_t at = 64 * K; at < 124 * K; at += 4 * K)
        record.discarded({at, at + 4 * K});
    CHECK(ready_clusters(record, g).empty());
    CHECK(record.totals().recorded_bytes == 60 * K);
    CHECK(record.totals().ready_bytes == 0);
    record.discarded({124 * K, 128 * K});
    CHECK(ready_clusters(record, g) == std::vector<std::uint64_t>{1});
    CHECK(record.totals().ready_bytes == 64 * K);
    SECTION("a write of one byte takes its granule out again") {
        record.written({100 * K, 100 * K + 1});
        CHECK(ready_clusters(record, g).empty());
        CHECK(record.totals().recorded_bytes == 60 * K);
        CHECK(record.totals().ready_bytes == 0);
    }
    SECTION("what is given back is forgotten") {
        record.forget({1, 2});
        CHECK(record.totals().recorded_bytes == 0);
        CHECK(record.memory_used() == 0);
    }
}

TEST_CASE("Only whole granules count, and a partial discard takes nothing away") {
    const Geometry g(1 << 20, 64 * K);
    Record record(g, plenty);
    record.discarded({1, 8 * K - 1});
    CHECK(record.totals().recorded_bytes == 0);
    record.discarded({100, 64 * K - 100});
    CHECK(record.totals().recorded_bytes == 56 * K);
    record.discarded({4 * K + 10, 4 * K + 20});
    CHECK(record.totals().recorded_bytes == 56 * K);
}

TEST_CASE("The end of a disk of odd size completes its last granule") {
    const Geometry g(65 * K + 100, 64 * K);
    Record record(g, plenty);
    record.discarded({64 * K, 65 * K});
    CHECK(ready_clusters(record, g).empty());
    record.discarded({64 * K, 65 * K + 100});
    CHECK(ready_clusters(record, g) == std::vector<std::uint64_t>{1});
}

TEST_CASE("Zeroes anywhere in a cluster make it one that must read as zeroes") {
    const Geometry g(1 << 20, 64 * K);
    Record record(g, plenty);
    record.discarded({0, 64 * K});
    CHECK_FALSE(record.next_ready({0, 16}, 16)->must_read_zero);
    SECTION("a granule of them") { record.zeroed({0, 4 * K}); }
    SECTION("less than a granule of them") { record.zeroed({10, 20}); }
    CHECK(record.next_ready({0, 16}, 16)->must_read_zero);
}

TEST_CASE("Runs of ready clusters end where the kind changes") {
    const Geometry g(1 << 20, 64 * K);
    Record record(g, plenty);
    record.discarded({0, 128 * K});
    record.zeroed({128 * K, 256 * K});
    const auto first = record.next_ready({0, 16}, 16);
    REQUIRE(first);
    CHECK(first->clusters.end == 2);
    const auto second = record.next_ready({2, 16}, 16);
    REQUIRE(second);
    CHECK(second->must_read_zero);
    CHECK(second->clusters.first == 2);
    CHECK(second->clusters.end == 4);
}

TEST_CASE("A run of ready clusters spans shards") {
    const Geometry g(std::uint64_t{1} << 30, 64 * K);
    Record record(g, plenty);
    record.zeroed({1020 * 64 * K, 1030 * 64 * K});
    const auto ready = record.next_ready({0, 16384}, 16384);
    REQUIRE(ready);
    CHECK(ready->clusters.first == 1020);
    CHECK(ready->clusters.end == 1030);
}

TEST_CASE("A full record forgets something else and stays within its memory") {
    const std::uint32_t cluster = GENERATE(4096u, 65536u, 2u << 20);
    const Geometry g(std::uint64_t{1} << 44, cluster);
    Record record(g, Record::smallest_memory);
    for (std::uint64_t c = 0; c < 100000; c++) {
        const std::uint64_t at = c * cluster;
        record.discarded({at, at + 4096});
        record.zeroed({at, at + 4096});
    }
    CHECK(record.memory_used() <= Record::smallest_memory);
    CHECK(record.memory_used() >= Record::smallest_memory / 2);
    const std::uint64_t last = 99999 * std::uint64_t{cluster};
    record.discarded({last, last + cluster});
    CHECK(record.next_ready({99999, 100000}, 1));
}

TEST_CASE("The record agrees with a plain array of granules", "[random]") {
    const std::uint32_t seed = std::random_device{}();
    INFO("seed " << seed);
    std::mt19937 random(seed);
    const std::uint32_t cluster = GENERATE(512u, 4096u, 65536u, 262144u, 2u << 20);
    const std::uint64_t size = 3000ull * cluster + 700;
    const Geometry g(size, cluster);
    Record record(g, 1ull << 30);
    const std::uint64_t granule = g.granule_size();
    std::vector<bool> marked((size + granule - 1) / granule);

    for (int step = 0; step < 3000; step++) {
        const std::uint64_t begin = random() % size;
        const std::uint64_t end = std::min<std::uint64_t>(size, begin + 1 + random() % (5 * cluster));
        if (random() % 3 == 0) {
            record.written({begin, end});
            for (std::uint64_t i = begin / granule; i * granule < end; i++)
                marked[i] = false;
        } else {
            random() % 2 ? record.zeroed({begin, end}) : record.discarded({begin, end});
            for (std::uint64_t i = (begin + granule - 1) / granule; i < marked.size(); i++)
                if (std::min(size, (i + 1) * granule) <= end)
                    marked[i] = true;
        }
    }
    std::vector<std::uint64_t> expected;
    std::uint64_t total = 0;
    for (std::uint64_t c = 0; c * cluster < size; c++) {
        bool all = true;
        for (std::uint64_t i = c * cluster / granule; i < marked.size() && i * granule < (c + 1) * cluster; i++) {
            all = all && marked[i];
            total += marked[i] ? granule : 0;
        }
        if (all)
            expected.push_back(c);
    }
    CHECK(record.totals().recorded_bytes == total);
    CHECK(ready_clusters(record, g) == expected);
    record.written({0, size});
    CHECK(record.totals().recorded_bytes == 0);
    CHECK(record.totals().ready_bytes == 0);
    CHECK(record.memory_used() == 0);
}
