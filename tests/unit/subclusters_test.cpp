// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Subclusters: bitmaps, and how ranges of bytes fall into them, against a model with one bool per byte.
#include "lib/subclusters.h"
#include "tests/catch.h"

#include <random>
#include <vector>

using namespace qlean;
using namespace qlean::subclusters;

namespace {

const Geometry small(14, 4, 1 << 20), large(21, 4, 1 << 30);

/// Kind of each byte, as f sees them.
std::vector<Kind> painted(const Grid &grid, Bitmap bitmap, std::uint64_t within, std::uint64_t length) {
    std::vector<Kind> bytes;
    std::uint64_t expected = within;
    bool first = true;
    Kind last{};
    grid.each_run(bitmap, within, length, [&](Kind kind, std::uint64_t at, std::uint64_t n) {
        CHECK(at == expected);
        CHECK(n > 0);
        CHECK((first || kind != last)); // runs are as long as they can be
        first = false;
        last = kind;
        expected += n;
        bytes.insert(bytes.end(), n, kind);
    });
    CHECK(expected == within + length);
    return bytes;
}

Bitmap random_bitmap(std::mt19937_64 &random) {
    Bitmap bitmap;
    for (unsigned i = 0; i < count; ++i)
        bitmap = bitmap.with(range(i, i + 1), static_cast<Kind>(random() % 3));
    return bitmap;
}

} // namespace

TEST_CASE("A set of subclusters may be empty or hold all 32") {
    CHECK(range(0, 0) == 0);
    CHECK(range(32, 32) == 0);
    CHECK(range(0, 32) == all);
    CHECK(range(31, 32) == 0x80000000u);
    CHECK(range(4, 8) == 0xf0u);
}

TEST_CASE("A bitmap keeps allocation in its low and zeroes in its high half") {
    CHECK(all_data.word() == 0xffffffffu);
    CHECK(all_zero.word() == 0xffffffff00000000u);
    CHECK(Bitmap(0x0000000300000004u).zero() == 3);
    CHECK(Bitmap(0x0000000300000004u).data() == 4);
    CHECK(Bitmap(0x0000000300000004u).unallocated() == ~7u);
    CHECK(Bitmap(0x0000000300000004u)[0] == Kind::zero);
    CHECK(Bitmap(0x0000000300000004u)[2] == Kind::data);
    CHECK(Bitmap(0x0000000300000004u)[31] == Kind::unallocated);
    CHECK(Bitmap(0x8000000080000000u).valid() == false);
    CHECK(Bitmap(0x4000000080000000u).valid());
}

TEST_CASE("Changing some subclusters of a bitmap leaves the others as they are") {
    std::mt19937_64 random(1);
    for (int n = 0; n < 2000; ++n) {
        const Bitmap before = random_bitmap(random);
        const auto set = static_cast<Set>(random());
        const auto kind = static_cast<Kind>(random() % 3);
        const Bitmap after = before.with(set, kind);
        REQUIRE(after.valid());
        for (unsigned i = 0; i < count; ++i)
            REQUIRE(after[i] == (set >> i & 1 ? kind : before[i]));
        REQUIRE((after.of(kind) & set) == set);
        REQUIRE((after.data() | after.zero() | after.unallocated()) == all);
    }
}

TEST_CASE("A range touches the subclusters it has a byte in, and covers those it has whole") {
    for (const Geometry &geometry : {small, large}) {
        const Grid grid(geometry);
        CHECK(grid.size() * count == geometry.cluster_size());
        CHECK(grid.touched(0, 0) == 0);
        CHECK(grid.covered(0, 0) == 0);
        CHECK(grid.touched(0, geometry.cluster_size()) == all);
        CHECK(grid.covered(0, geometry.cluster_size()) == all);
        CHECK(grid.touched(geometry.cluster_size() - 1, 1) == 0x80000000u);
        CHECK(grid.covered(1, geometry.cluster_size() - 1) == ~1u);
        CHECK(grid.covered(0, geometry.cluster_size() - 1) == all >> 1);
        CHECK(grid.covered(1, grid.size()) == 0);
        std::mt19937_64 random(2);
        for (int n = 0; n < 2000; ++n) {
            const std::uint64_t within = random() % geometry.cluster_size();
            const std::uint64_t length = random() % (geometry.cluster_size() - within + 1);
            Set touched = 0, covered = 0;
            for (unsigned i = 0; i < count; ++i) {
                const std::uint64_t from = grid.bytes(i), to = grid.bytes(i + 1);
                if (length > 0 && within < to && within + length > from)
                    touched |= range(i, i + 1);
                if (within <= from && within + length >= to)
                    covered |= range(i, i + 1);
            }
            REQUIRE(grid.touched(within, length) == touched);
            REQUIRE(grid.covered(within, length) == covered);
        }
    }
}

TEST_CASE("Runs of one kind are found, and cover the range without a gap") {
    const Grid grid(small);
    std::mt19937_64 random(3);
    for (int n = 0; n < 300; ++n) {
        const Bitmap bitmap = random_bitmap(random);
        const std::uint64_t within = random() % small.cluster_size();
        const std::uint64_t length = random() % (small.cluster_size() - within + 1);
        const auto bytes = painted(grid, bitmap, within, length);
        REQUIRE(bytes.size() == length);
        for (std::uint64_t i = 0; i < length; ++i)
            REQUIRE(bytes[i] == bitmap[static_cast<unsigned>((within + i) / grid.size())]);
        Set seen = 0;
        grid.each_run(bitmap.data(), [&](std::uint64_t at, std::uint64_t m) {
            REQUIRE(m > 0);
            REQUIRE((seen & grid.covered(at, m)) == 0);
            REQUIRE(grid.covered(at, m) == grid.touched(at, m));
            seen |= grid.covered(at, m);
        });
        REQUIRE(seen == bitmap.data());
    }
    CHECK(painted(grid, all_data, 0, small.cluster_size()).size() == small.cluster_size());
    grid.each_run(Set{0}, [](std::uint64_t, std::uint64_t) { FAIL("a run of nothing"); });
    int runs = 0;
    grid.each_run(all, [&](std::uint64_t at, std::uint64_t n) {
        ++runs;
        CHECK(at == 0);
        CHECK(n == small.cluster_size());
    });
    CHECK(runs == 1);
}

TEST_CASE("What goes back to the host never holds data outside of the range, and is all there is near it") {
    constexpr std::uint64_t block = 4096;
    std::mt19937_64 random(4);
    for (const unsigned bits : {14u, 16u, 18u}) {
        const Geometry geometry(bits, 4, 1 << 20);
        const Grid grid(geometry);
        for (int n = 0; n < 3000; ++n) {
            const std::uint64_t unit = n % 3 == 0 ? 1 : n % 3 == 1 ? 512 : grid.size();
            const std::uint64_t within = round_down(random() % geometry.cluster_size(), unit);
            const std::uint64_t length =
                std::max(round_down(random() % (geometry.cluster_size() - within + 1), unit), std::uint64_t{1});
            const Set occupied = static_cast<Set>(random() | (n % 2 ? random() : 0)) & ~grid.covered(within, length);
            const Piece piece = returnable(grid, occupied, within, length, block);
            REQUIRE(piece.within % block == 0);
            REQUIRE(piece.length % block == 0);
            REQUIRE(piece.within + piece.length <= geometry.cluster_size());
            for (std::uint64_t at = 0; at < geometry.cluster_size(); at += block) {
                bool holds = false, near = at < within + length && at + block > within,
                     inside = at >= within && at + block <= within + length;
                for (std::uint64_t b = at; b < at + block; b += 512)
                    holds = holds || (occupied >> b / grid.size() & 1);
                const bool back = at >= piece.within && at + block <= piece.within + piece.length;
                if (back)
                    REQUIRE((inside || !holds));
                else if (grid.covered(within, length) & grid.touched(at, block))
                    REQUIRE((holds || !near));
                else
                    REQUIRE(!inside);
            }
        }
    }
    const Grid grid(small); // subclusters of 512 bytes, eight to a block: the last piece of a block gives it back
    CHECK(returnable(grid, all & ~range(0, 7), 6 * 512, 512, block).length == 0);
    CHECK(returnable(grid, all & ~range(0, 8), 6 * 512, 512, block).length == block);
    CHECK(returnable(grid, all & ~range(0, 24), 8 * 512, 512, block).within == block);
    CHECK(returnable(grid, all & ~range(0, 24), 8 * 512, 512, block).length == block);
    CHECK(returnable(grid, 0, 0, small.cluster_size(), block).length == small.cluster_size());
}
