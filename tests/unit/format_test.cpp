// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The pure parts of the format: byte order, addresses and geometry, L2 entries, refcount blocks of every width.
#include "lib/address.h"
#include "lib/byte_order.h"
#include "lib/l2_entry.h"
#include "lib/refcount_block.h"
#include "tests/catch.h"
#include "tests/fault/scene.h"

#include <array>
#include <random>

using namespace qlean;

TEST_CASE("Numbers are stored with the most significant byte first") {
    std::array<std::byte, 16> bytes{};
    store_be<std::uint64_t>(bytes, 3, 0x0102030405060708u);
    for (unsigned i = 0; i < 8; ++i)
        CHECK(bytes[3 + i] == std::byte(i + 1));
    CHECK(bytes[2] == std::byte{0});
    CHECK(bytes[11] == std::byte{0});
    CHECK(load_be<std::uint64_t>(bytes, 3) == 0x0102030405060708u);
    CHECK(load_be<std::uint32_t>(bytes, 4) == 0x02030405u);
    CHECK(load_be<std::uint16_t>(bytes, 9) == 0x0708u);
    CHECK(load_be<std::uint8_t>(bytes, 10) == 8);
    store_be<std::uint32_t>(bytes, 0, 0xfffefdfcu);
    CHECK(load_be<std::uint16_t>(bytes, 1) == 0xfefdu);
    CHECK(big_endian(big_endian(std::uint32_t{0x12345678})) == 0x12345678u);
}

TEST_CASE("Division and rounding do not overflow at the top") {
    CHECK(divide_up(0, 512) == 0);
    CHECK(divide_up(1, 512) == 1);
    CHECK(divide_up(512, 512) == 1);
    CHECK(divide_up(~std::uint64_t{0}, 2) == std::uint64_t{1} << 63);
    CHECK(round_down(1023, 512) == 512);
    CHECK(round_up(513, 512) == 1024);
}

TEST_CASE("Geometry follows from cluster size, refcount width and disk size") {
    const Geometry g(16, 4, (std::uint64_t{10} << 30) + 1);
    CHECK(g.cluster_size() == 65536);
    CHECK(g.guest_clusters() == 163841); // the last one is partial
    CHECK(g.l2_entries() == 8192);
    CHECK(g.l1_entries() == 21);
    CHECK(g.refcounts_per_block() == 32768);
    CHECK(g.l1_index(GuestCluster{8192}) == 1);
    CHECK(g.l2_index(GuestCluster{8193}) == 1);
    CHECK(g.within(GuestOffset{65537}) == 1);
    CHECK(g.cluster_of(GuestOffset{65535}).value == 0);
    CHECK(g.offset_of(HostCluster{3}).value == 3 * 65536);
    CHECK(Geometry(9, 6, 0).guest_clusters() == 0);
    CHECK(Geometry(9, 6, 0).refcounts_per_block() == 64);
    CHECK(Geometry(21, 0, 1).refcounts_per_block() == std::uint64_t{1} << 24);
    CHECK(Geometry(21, 4, std::uint64_t{1} << 62).l1_entries() == std::uint64_t{1} << (62 - 21 - 18));
}

TEST_CASE("Runs join where they touch, and only there") {
    std::vector<HostRun> runs;
    append_run(runs, {{10}, 2});
    append_run(runs, {{12}, 3});
    append_run(runs, {{20}, 0});
    append_run(runs, {{5}, 1});
    CHECK(runs == std::vector<HostRun>{{{10}, 5}, {{5}, 1}});
    append_run(runs, {{6}, 4});
    coalesce(runs);
    CHECK(runs == std::vector<HostRun>{{{5}, 10}});
    CHECK(cluster_count(runs) == 10);
}

TEST_CASE("Every kind of L2 entry is told from the others") {
    using Kind = Mapping::Kind;
    const auto kind = [](std::uint64_t word, unsigned version = 3) { return entry::decode(word, 16, version).kind; };
    CHECK(kind(0) == Kind::unallocated);
    CHECK(kind(1) == Kind::zero);
    CHECK(kind(0x50000) == Kind::data);
    CHECK(kind(0x50001) == Kind::zero_allocated);
    CHECK(kind(entry::copied | 0x50001) == Kind::zero_allocated);
    CHECK(kind(entry::compressed | 0x1234567) == Kind::compressed);
    CHECK(kind(entry::copied) == Kind::damaged); // COPIED of nothing
    CHECK(kind(0x50200) == Kind::damaged);       // not at a cluster boundary
    CHECK(kind(0x50002) == Kind::damaged);       // reserved bits
    CHECK(kind(0x0100000000050000) == Kind::damaged);
    CHECK(kind(1, 2) == Kind::damaged); // no zero flag in version 2
    CHECK(kind(0x50001, 2) == Kind::damaged);
    const Mapping m = entry::decode(entry::data(HostOffset{0x70000}), 16, 3);
    CHECK(m.host.value == 7);
    CHECK(m.copied);
    CHECK(m.writable_in_place());
    CHECK_FALSE(entry::decode(0x70000, 16, 3).writable_in_place());
    CHECK_FALSE(entry::decode(entry::copied | 0x70001, 16, 3).writable_in_place());
    CHECK(entry::decode(0x70001, 16, 3).is_zero());
}

TEST_CASE("Any word decodes to something, and to a host cluster only if that is what the word says") {
    std::mt19937_64 random(fault::fresh_seed());
    for (int i = 0; i < 100000; ++i) {
        std::uint64_t word = random();
        if (i % 2)
            word &= entry::copied | 0xff0000 | 1;
        for (const unsigned version : {2u, 3u}) {
            const Mapping m = entry::decode(word, 16, version);
            if (m.has_host()) {
                INFO(word);
                REQUIRE((m.host.value << 16 | (m.copied ? entry::copied : 0) |
                         (m.kind == Mapping::Kind::data ? 0 : 1)) == word);
                REQUIRE(m.host.value != 0);
            }
        }
    }
}

TEST_CASE("L1 entries: reserved bits and misaligned tables are refused") {
    CHECK(entry::valid_l1(0, 16));
    CHECK(entry::valid_l1(entry::copied | 0x50000, 16));
    CHECK(entry::valid_l1(0x50000, 16));
    CHECK_FALSE(entry::valid_l1(entry::copied, 16));
    CHECK_FALSE(entry::valid_l1(0x50200, 16));
    CHECK_FALSE(entry::valid_l1(0x50001, 16));
    CHECK_FALSE(entry::valid_l1(entry::compressed | 0x50000, 16));
    CHECK(entry::table(entry::copied | 0x50000).value == 0x50000);
}

TEST_CASE("Refcounts of every width keep to themselves") {
    std::mt19937_64 random(fault::fresh_seed());
    for (unsigned order = 0; order <= 6; ++order) {
        INFO("width " << (1u << order));
        std::vector<std::byte> bytes(512);
        RefcountView view(bytes, order);
        REQUIRE(view.size() == 4096u >> order);
        const std::uint64_t max = RefcountView::max(order);
        CHECK(max == (order == 6 ? ~std::uint64_t{0} : (std::uint64_t{1} << (1u << order)) - 1));
        std::vector<std::uint64_t> model(view.size());
        for (int i = 0; i < 5000; ++i) {
            const std::size_t at = random() % view.size();
            model[at] = i % 3 == 0 ? max : random() & max;
            view.set(at, model[at]);
        }
        for (std::size_t i = 0; i < view.size(); ++i)
            REQUIRE(view.get(i) == model[i]);
    }
}

TEST_CASE("Narrow refcounts are packed from the least significant bit, wide ones big-endian") {
    std::vector<std::byte> bytes(8);
    RefcountView(bytes, 0).set(3, 1);
    CHECK(bytes[0] == std::byte{0x08});
    bytes.assign(8, std::byte{0});
    RefcountView(bytes, 1).set(1, 2);
    CHECK(bytes[0] == std::byte{0x08});
    bytes.assign(8, std::byte{0});
    RefcountView(bytes, 2).set(1, 0xa);
    CHECK(bytes[0] == std::byte{0xa0});
    bytes.assign(8, std::byte{0});
    RefcountView(bytes, 4).set(1, 0x0102);
    CHECK(bytes[2] == std::byte{1});
    CHECK(bytes[3] == std::byte{2});
}
