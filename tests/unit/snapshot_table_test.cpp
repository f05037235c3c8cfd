// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The snapshot table: what goes in comes out, whatever else is in it; and no bytes break it.
#include "lib/byte_order.h"
#include "lib/error.h"
#include "lib/snapshot_table.h"
#include "tests/catch.h"
#include "tests/fault/scene.h"

#include <random>

using namespace qlean;

namespace {

const Geometry geometry(16, 4, std::uint64_t{1} << 30);

SnapshotEntry entry_of(const std::string &id, const std::string &name, std::size_t extra) {
    SnapshotEntry e;
    e.l1_offset = {0x50000};
    e.l1_size = 2;
    e.id = id;
    e.name = name;
    e.date_sec = 0xfffffff0u;
    e.date_nsec = 999999999;
    e.vm_clock_nsec = 0x0102030405060708u;
    e.vm_state_size_32 = 77;
    e.extra.resize(extra);
    for (std::size_t i = 0; i < extra; ++i)
        e.extra[i] = std::byte(i);
    if (extra >= 16)
        store_be<std::uint64_t>(e.extra, 8, std::uint64_t{1} << 33);
    return e;
}

SnapshotTable decode(const std::vector<std::byte> &bytes, std::uint32_t count, std::uint64_t *length) {
    return SnapshotTable::decode(bytes, count, geometry, "x.qcow2", length);
}

} // namespace

TEST_CASE("A snapshot table goes through unchanged, extra data that nobody understands included") {
    for (const std::size_t extra : {0, 3, 8, 15, 16, 24, 1024}) {
        SnapshotTable table;
        table.entries = {entry_of("1", "one", extra), entry_of("2", "", 16), entry_of("", std::string(65535, 'n'), 24),
                         entry_of("4", "\xff\x01 four", extra)};
        auto bytes = table.encode();
        const std::uint64_t whole = bytes.size();
        bytes.resize(bytes.size() + 512); // a table is read with what follows it
        std::uint64_t length = 0;
        const SnapshotTable again = decode(bytes, 4, &length);
        CHECK(again.entries == table.entries);
        CHECK(length == whole);
        CHECK(again.encode() == table.encode());
        const auto positions = table.positions();
        for (std::size_t i = 0; i < 4; ++i)
            CHECK(load_be<std::uint64_t>(bytes, positions[i]) == table.entries[i].l1_offset.value);
    }
}

TEST_CASE("VM state size and disk size come from the extra data where it has them") {
    CHECK(entry_of("1", "a", 0).vm_state_size() == 77);
    CHECK(entry_of("1", "a", 7).vm_state_size() == 77);
    CHECK(entry_of("1", "a", 8).vm_state_size() == 0x0001020304050607u);
    CHECK(entry_of("1", "a", 15).disk_size(5) == 5);
    CHECK(entry_of("1", "a", 16).disk_size(5) == std::uint64_t{1} << 33);
}

TEST_CASE("A snapshot table that lies is refused") {
    SnapshotTable table;
    table.entries = {entry_of("1", "one", 16)};
    const auto good = table.encode();
    std::uint64_t length = 0;
    CHECK_NOTHROW(decode(good, 1, &length));
    CHECK_THROWS_AS(decode(good, 2, &length), Error);
    CHECK_THROWS_AS(decode(good, 65537, &length), Error);
    for (std::size_t cut = 0; cut < good.size(); ++cut)
        CHECK_THROWS_AS(decode({good.begin(), good.begin() + static_cast<std::ptrdiff_t>(cut)}, 1, &length), Error);
    const auto with = [&](std::size_t at, std::uint32_t value) {
        auto bad = good;
        store_be<std::uint32_t>(bad, at, value);
        return bad;
    };
    CHECK_THROWS_AS(decode(with(4, 0x50200), 1, &length), Error);     // L1 not on a cluster boundary
    CHECK_THROWS_AS(decode(with(0, 0x80000000), 1, &length), Error);  // L1 beyond any file
    CHECK_THROWS_AS(decode(with(4, 0), 1, &length), Error);           // L1 on the header
    CHECK_THROWS_AS(decode(with(8, 0x00400001), 1, &length), Error);  // more than 32 MiB of L1
    CHECK_THROWS_AS(decode(with(36, 0xffffffff), 1, &length), Error); // extra data without end
    CHECK_THROWS_AS(decode(with(48, 0x80000000), 1, &length), Error); // a disk without end
}

TEST_CASE("No bytes break the decoder of snapshot tables") {
    const auto seed = fault::fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 random(seed);
    SnapshotTable table;
    table.entries = {entry_of("1", "one", 16), entry_of("2", "two", 24), entry_of("3", "three", 0)};
    const auto good = table.encode();
    for (int i = 0; i < 20000; ++i) {
        auto bytes = good;
        for (auto n = random() % 4 + 1; n > 0; --n)
            bytes[random() % bytes.size()] = std::byte(random());
        bytes.resize(random() % 8 == 0 ? random() % bytes.size() : bytes.size());
        std::uint64_t length = 0;
        try {
            const auto count = static_cast<std::uint32_t>(random() % 5);
            const SnapshotTable decoded = decode(bytes, count, &length);
            REQUIRE(decoded.entries.size() == count);
            REQUIRE(length <= bytes.size());
            REQUIRE(decoded.encode().size() == length);
        } catch (const Error &error) {
            REQUIRE(error.kind() == Error::Kind::bad_image);
        }
    }
}
