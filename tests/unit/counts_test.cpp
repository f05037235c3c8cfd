// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Refcounts that are wrong, or missing: what the image uses is neither handed out nor written in place of something
// else.
#include "lib/byte_order.h"
#include "lib/error.h"
#include "lib/l2_entry.h"
#include "lib/state.h"
#include "tests/fault/scene.h"

using namespace qlean;
using namespace qlean::fault;

namespace {

constexpr std::uint64_t cluster = 512, leaked = 109;

/// Two bitmaps, one with bits stored, and room.
BuiltImage with_bitmaps() {
    ImagePlan plan;
    plan.virtual_size = 200 * cluster;
    plan.map(100, 2);
    plan.metadata_at = 110;
    plan.bitmaps = true;
    plan.leaked = {leaked};
    return build_image(plan);
}

void set_count(BuiltImage &image, std::uint64_t at, std::uint16_t count) {
    REQUIRE(load_be<std::uint16_t>(image.bytes, image.refcount_at(at / cluster)) != count);
    store_be<std::uint16_t>(image.bytes, image.refcount_at(at / cluster), count);
}

} // namespace

TEST_CASE("What the image uses besides data is not handed out, though its refcount says that it is free") {
    BuiltImage sound = with_bitmaps();
    sound.bytes = with_snapshot(sound.bytes, "s");
    const auto disk = std::make_shared<FaultyDisk>(sound.bytes);
    {
        const auto image = open_image(disk); // the snapshot's table is its own now
        image->write(bytes_of(cluster, 3), {2 * cluster});
        image->close();
    }
    sound.bytes = disk->bytes();
    const std::uint64_t snapshot_table = sound.word(64), snapshot_l1 = sound.word(snapshot_table);
    const std::uint64_t active = sound.word(sound.word(40)) & entry::offset_mask;
    const std::uint64_t kept = sound.word(snapshot_l1) & entry::offset_mask;
    REQUIRE(active != kept);
    const std::vector<std::pair<const char *, std::uint64_t>> places = {
        {"the header", 0},
        {"the L1 table", sound.word(40)},
        {"an L2 table", active},
        {"the refcount table", sound.word(48)},
        {"a refcount block", sound.word(sound.word(48))},
        {"the snapshot table", snapshot_table},
        {"a snapshot's L1 table", snapshot_l1},
        {"a snapshot's L2 table", kept},
        {"the bitmap directory", sound.enabled_bitmap},
        {"a bitmap's table", sound.word(sound.disabled_bitmap)},
        {"a bitmap's bits", sound.word(sound.word(sound.disabled_bitmap))},
        {"an enabled bitmap's bits", sound.word(sound.word(sound.enabled_bitmap))}};
    const auto handed_out = [&](std::uint64_t at) {
        BuiltImage lying = sound;
        set_count(lying, at, 0);
        const auto image = open_image(std::make_shared<FaultyDisk>(lying.bytes));
        Allocator &allocator = image->state().allocator;
        allocator.load_all();
        const auto all = allocator.reserve_below(allocator.end(), {allocator.end()});
        return std::any_of(all.extents().begin(), all.extents().end(), [&](const Allocator::Extent &e) {
            return e.run.first.value <= at / cluster && at / cluster < e.run.end().value;
        });
    };
    for (const auto &[what, at] : places) {
        INFO(what << " at " << at);
        CHECK_FALSE(handed_out(at));
    }
    CHECK(handed_out(leaked * cluster));
}

TEST_CASE("A bitmap that shares its place with something else is not stored, and none counts any more") {
    BuiltImage image = with_bitmaps();
    const std::uint64_t bits = image.word(image.word(image.disabled_bitmap)), data = 7 * cluster;
    const Bytes stored(image.bytes.begin() + static_cast<std::ptrdiff_t>(bits),
                       image.bytes.begin() + static_cast<std::ptrdiff_t>(bits + cluster));
    SECTION("another bitmap") { image.set_word(image.word(image.enabled_bitmap), bits); }
    SECTION("an L2 table") { image.set_word(image.word(image.enabled_bitmap), image.l2_tables.at(0)); }
    SECTION("data, as its refcount says") {
        image.set_word(image.word(image.enabled_bitmap), data);
        set_count(image, data, 2);
    }
    const auto disk = std::make_shared<FaultyDisk>(image.bytes);
    Bytes model = guest_bytes(image.bytes);
    {
        const auto opened = open_image(disk);
        opened->write(bytes_of(cluster, 3), {20 * cluster});
        opened->close();
    }
    std::fill_n(model.begin() + 20 * cluster, cluster, std::byte{3});
    const Bytes after = disk->bytes();
    CHECK((guest_bytes(after) == model));
    CHECK(std::equal(stored.begin(), stored.end(), after.begin() + static_cast<std::ptrdiff_t>(bits)));
    CHECK((load_be<std::uint64_t>(after, 88) & Header::autoclear_bitmaps) == 0);
}

TEST_CASE("Counts of a region far beyond the end of the file are nobody's clusters") {
    constexpr std::uint64_t size = 65536, region = 8000;
    ImagePlan plan;
    plan.cluster_bits = 16;
    plan.virtual_size = 16 * size;
    plan.map(8, 4);
    plan.leaked = {20}; // becomes the block of that region
    BuiltImage built = build_image(plan);
    built.set_word(built.refcount_table + region * 8, 20 * size);
    store_be<std::uint16_t>(std::span(built.bytes), 20 * size + 2 * 5, 1);
    Scene s(built.bytes);
    const Bytes before = read_all(*s.image);
    Compact compact(*s.image, s.ownership, s.gauges, 7);
    compact.plan({0}, s.image->size(), 1000);
    compact.commit(never);
    CHECK((read_all(*s.image) == before));
    CHECK(judge(s.disk->bytes()).sound());
}

TEST_CASE("An image is not opened for writing if one of its tables lies where there is no refcount block") {
    ImagePlan plan;
    const bool of_snapshot = GENERATE(false, true);
    if (of_snapshot) { // which takes the lowest places: there is none in the first region of 256 clusters
        plan.metadata_at = 1;
        plan.virtual_size = 250 * cluster;
        plan.map(247, 9);
        plan.leaked = {300};
    } else {
        plan.metadata_at = 300;
        plan.virtual_size = 64 * cluster;
        plan.map(40, 8);
    }
    BuiltImage built = build_image(plan);
    if (of_snapshot)
        built.bytes = with_snapshot(built.bytes, "s");
    CHECK((built.word(64) >= 256 * cluster) == of_snapshot);
    const std::uint64_t table = built.word(48);
    REQUIRE(built.word(table + 8) != 0);
    const Bytes before = read_all(*open_image(std::make_shared<FaultyDisk>(built.bytes), true));
    built.set_word(table + 8, 0);
    const auto disk = std::make_shared<FaultyDisk>(built.bytes);
    std::string said;
    try {
        // The first commit links blocks where the file has none: over the tables, if it is let.
        const auto image = open_image(disk);
        image->write(bytes_of(512, 1), {0});
        image->close();
    } catch (const Error &error) {
        said = error.what();
    }
    CHECK(said.find("for which there is no refcount block") != std::string::npos);
    CHECK((disk->bytes() == built.bytes));
    CHECK((read_all(*open_image(disk, true)) == before));
}

TEST_CASE("What lies in the file where there is no refcount block is not given away") {
    constexpr std::uint64_t clusters = 400;
    ImagePlan plan;
    plan.metadata_at = 1;
    plan.virtual_size = (clusters + 300) * 512;
    plan.map(clusters, GENERATE(20, 40)); // with and without room for new blocks before it
    BuiltImage built = build_image(plan);
    const std::uint64_t table = built.word(48);
    REQUIRE(built.word(table + 8) != 0);
    built.set_word(table + 8, 0); // of the second 256 clusters
    const auto disk = std::make_shared<FaultyDisk>(built.bytes);
    const auto image = open_image(disk);
    Bytes model = read_all(*image);
    const Bytes more = bytes_of(250 * 512, 0x77);
    image->write(more, {clusters * 512});
    image->flush();
    std::copy(more.begin(), more.end(), model.begin() + clusters * 512);
    CHECK((read_all(*image) == model));
    image->close();
    CHECK((guest_bytes(disk->bytes()) == model));
    CHECK(judge(disk->bytes()).sound());
}
