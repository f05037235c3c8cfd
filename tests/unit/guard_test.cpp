// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// An L2 entry that claims the image's own metadata for the guest: nothing is written there, nothing of it is given back
// or handed out, and the rest of the disk goes on.
#include "lib/byte_order.h"
#include "lib/error.h"
#include "lib/l2_entry.h"
#include "lib/metadata_guard.h"
#include "tests/fault/scene.h"

using namespace qlean;
using namespace qlean::fault;

namespace {

constexpr std::uint64_t cluster = 512;

BuiltImage sound_image() {
    ImagePlan plan;
    plan.virtual_size = 200 * cluster;
    for (std::uint64_t c = 0; c < 100; ++c)
        plan.data[c] = 2 + c;
    plan.metadata_at = 110;
    return build_image(plan);
}

} // namespace

TEST_CASE("The guard knows what it was told, as far as an image can reach") {
    for (const unsigned bits : {9u, 16u, 21u}) {
        MetadataGuard guard(bits);
        const HostCluster last{(std::uint64_t{1} << (56 - bits)) - 1};
        guard.add({{5}, 3});
        guard.add({last, 1});
        CHECK_FALSE(guard.has({4}));
        CHECK(guard.has({5}));
        CHECK(guard.has({7}));
        CHECK_FALSE(guard.has({8}));
        CHECK(guard.has(last));
        CHECK_FALSE(guard.has(last + 1));
        guard.remove({{6}, 100});
        CHECK(guard.has({5}));
        CHECK_FALSE(guard.has({6}));
        guard.add(HostOffset{std::uint64_t{9} << bits}, (std::uint64_t{1} << bits) + 1);
        CHECK(guard.has({10}));
        CHECK_FALSE(guard.has({11}));
    }
}

TEST_CASE("What claims metadata is not written, zeroed, trimmed or moved") {
    const BuiltImage sound = sound_image();
    const std::vector<std::pair<const char *, std::uint64_t>> places = {
        {"the header", 0},
        {"the L1 table", sound.l1},
        {"its own L2 table", sound.l2_tables.at(0)},
        {"another L2 table", sound.l2_tables.at(1)},
        {"the refcount table", sound.refcount_table},
        {"a refcount block", sound.refcount_blocks.front()}};
    for (const auto &[what, place] : places)
        for (const bool zero : {false, true}) {
            if (place == 0)
                continue; // offset 0 means no cluster
            INFO(what << (zero ? ", kept for zeroes" : ""));
            BuiltImage image = sound;
            image.set_word(image.l2_entry_at(1), entry::data({place}) | (zero ? entry::zero : 0));
            auto disk = std::make_shared<FaultyDisk>(image.bytes);
            const auto metadata = [&] {
                Bytes all;
                const Bytes now = disk->bytes();
                for (std::uint64_t i = 0; i < cluster; ++i)
                    all.push_back(now[place + i]);
                return all;
            };
            {
                auto opened = open_image(disk);
                const Bytes before = metadata();
                const Bytes data = bytes_of(cluster, 7);
                CHECK_THROWS_AS(opened->write(data, {cluster}), Error);
                CHECK_THROWS_AS(opened->write(std::span(data).first(100), {cluster + 9}), Error);
                CHECK_THROWS_AS(opened->zero({cluster}, cluster, Image::Zero::keep_space, false), Error);
                CHECK_THROWS_AS(opened->zero({cluster}, cluster, Image::Zero::may_trim, false), Error);
                CHECK_THROWS_AS(opened->zero({cluster + 1}, 100, Image::Zero::keep_space, false), Error);
                opened->trim({cluster}, cluster);
                opened->trim({cluster - 10}, cluster + 100);
                opened->give_back();
                // Refcounts may have changed; what the guest wrote, or zeroes, must not be there.
                CHECK(
                    (place == sound.refcount_table || place == sound.refcount_blocks.front() || metadata() == before));
                CHECK_FALSE(all_are(metadata(), 7));
                CHECK_FALSE(all_are(metadata(), 0));
                CHECK_FALSE(opened->state().allocator.is_free({place / cluster}));
                // The rest of the disk is as good as ever, a table that comes new too.
                opened->write(data, {150 * cluster});
                opened->write(data, {2 * cluster});
                opened->flush();
                CHECK((read_some(*opened, 150 * cluster, cluster) == data));
                CHECK((read_some(*opened, 2 * cluster, cluster) == data));
                opened->close();
            }
            auto again = open_image(disk);
            CHECK((read_some(*again, 150 * cluster, cluster) == bytes_of(cluster, 7)));
        }
}

TEST_CASE("Metadata that an entry shares without the right to write is copied, and never made free") {
    BuiltImage image = sound_image();
    // No flag, and a refcount that does not count the second use: to let go of it must not free the table.
    image.set_word(image.l2_entry_at(1), image.l2_tables.at(1));
    auto disk = std::make_shared<FaultyDisk>(image.bytes);
    auto opened = open_image(disk);
    const HostCluster table{image.l2_tables.at(1) / cluster};
    const Bytes data = bytes_of(cluster, 9);
    opened->write(data, {cluster});
    opened->give_back();
    CHECK_FALSE(opened->state().allocator.is_free(table));
    CHECK((read_some(*opened, cluster, cluster) == data));
    opened->close();
    const Verdict verdict = judge(disk->bytes());
    INFO(verdict.text());
    CHECK(verdict.sound());
    CHECK(verdict.leaks == 1); // what guest cluster 1 had before
    CHECK((read_some(*opened, 70 * cluster, cluster) ==
           read_some(*open_image(std::make_shared<FaultyDisk>(sound_image().bytes)), 70 * cluster, cluster)));
}
