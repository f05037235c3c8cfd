// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// An L2 entry that claims the image's own metadata for the guest: nothing is written there, nothing of it is given back
// or handed out, and the rest of the disk goes on.
#include "lib/bitmap_directory.h"
#include "lib/byte_order.h"
#include "lib/error.h"
#include "lib/l2_entry.h"
#include "lib/metadata_guard.h"
#include "tests/fault/scene.h"

using namespace qlean;
using namespace qlean::fault;

namespace {

constexpr std::uint64_t cluster = 512;

BuiltImage sound_image(bool bitmaps = false) {
    ImagePlan plan;
    plan.virtual_size = 200 * cluster;
    plan.map(100, 2);
    plan.metadata_at = 110;
    plan.bitmaps = bitmaps;
    return build_image(plan);
}

/// `image`, which has a snapshot, after a write: the active image has a table of its own, and the old one is the
/// snapshot's alone.
BuiltImage with_own_table(BuiltImage image) {
    auto disk = std::make_shared<FaultyDisk>(image.bytes);
    auto opened = open_image(disk);
    opened->write(bytes_of(cluster, 3), {2 * cluster});
    opened->close();
    image.bytes = disk->bytes();
    return image;
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
        {"the L1 table", sound.l1},
        {"its own L2 table", sound.l2_tables.at(0)},
        {"another L2 table", sound.l2_tables.at(1)},
        {"the refcount table", sound.refcount_table},
        {"a refcount block", sound.refcount_blocks.front()}};
    for (const auto &[what, place] : places)
        for (const bool zero : {false, true}) {
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

TEST_CASE("What claims metadata is not changed by pieces of less than a cluster either") {
    constexpr std::uint64_t size = 16384, sub = 512;
    ImagePlan plan;
    plan.cluster_bits = 14;
    plan.virtual_size = 12 * size;
    plan.extended = true;
    plan.map(8, 2);
    plan.metadata_at = 12;
    const BuiltImage sound = build_image(plan);
    const std::vector<std::pair<const char *, std::uint64_t>> places = {
        {"the L1 table", sound.l1},
        {"the L2 table", sound.l2_tables.at(0)},
        {"the refcount table", sound.refcount_table},
        {"a refcount block", sound.refcount_blocks.front()}};
    for (const auto &[what, place] : places)
        for (const std::uint64_t bitmap : {0xffffffffu, 0x0000ffffu, 0u}) { // subclusters that are data
            INFO(what << ", subclusters " << bitmap);
            BuiltImage image = sound;
            const std::uint64_t at = image.l2_entry_at(1, 14);
            image.set_word(at, entry::data({place}));
            image.set_word(at + 8, bitmap);
            const auto disk = std::make_shared<FaultyDisk>(image.bytes);
            const auto opened = open_image(disk);
            const auto attempt = [](const auto &request) {
                try {
                    request();
                } catch (const Error &) {
                }
            };
            for (const std::uint64_t s : {0, 3, 20, 31}) {
                const GuestOffset piece{size + s * sub};
                attempt([&] { opened->trim(piece, sub); });
                attempt([&] { opened->trim(piece + 7, 2 * sub - 20); });
                attempt([&] { opened->zero(piece, sub, Image::Zero::keep_space, false); });
                attempt([&] { opened->zero(piece, sub, Image::Zero::may_trim, false); });
                attempt([&] { opened->zero(piece + 9, 100, Image::Zero::may_trim, false); });
                CHECK_THROWS_AS(opened->write(bytes_of(sub, 7), piece), Error);
                CHECK_THROWS_AS(opened->write(bytes_of(50, 7), piece + 9), Error);
            }
            const Bytes now = disk->bytes(); // before any commit: nothing has a reason to write there
            CHECK(std::equal(now.begin() + static_cast<std::ptrdiff_t>(place),
                             now.begin() + static_cast<std::ptrdiff_t>(place + size),
                             image.bytes.begin() + static_cast<std::ptrdiff_t>(place)));
            opened->give_back();
            CHECK_FALSE(opened->state().allocator.is_free({place / size}));
            opened->write(bytes_of(sub, 9), {10 * size}); // the rest goes on
            opened->flush();
            opened->close();
            CHECK((read_some(*open_image(disk), 10 * size, sub) == bytes_of(sub, 9)));
        }
}

TEST_CASE("The header of the encryption is metadata") {
    const BuiltImage image = sound_image();
    const auto file = std::make_shared<FaultyFile>(std::make_shared<FaultyDisk>(image.bytes));
    const auto open_with = [&](HostRun encryption_header) {
        auto [header, sector] = read_header(*file);
        std::vector<std::uint64_t> l1(header.l1_size), table(cluster / 8);
        file->read(std::as_writable_bytes(std::span(l1)), header.l1_offset);
        file->read(std::as_writable_bytes(std::span(table)), header.refcount_table_offset);
        return State({.file = file,
                      .data = nullptr,
                      .backing = nullptr,
                      .header = header,
                      .encryption_header = encryption_header,
                      .header_sector = sector,
                      .l1_words = l1,
                      .refcount_table = table,
                      .snapshots = {},
                      .end = image.bytes.size() / cluster,
                      .read_only = false,
                      .cache_bytes = 64 * 1024});
    };
    State state = open_with({{105}, 3});
    for (const std::uint64_t c : {105, 106, 107})
        CHECK(state.guard.has({c}));
    CHECK_FALSE(state.guard.has({104}));
    CHECK_FALSE(state.guard.has({108}));
    CHECK_THROWS_AS(open_with({{image.l1 / cluster}, 1}), Error);
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

namespace {

/// Everything a guest can do to [at, at + length), at whole clusters and within them; `to` is what it writes last.
void change_in_every_way(Image &image, std::uint64_t at, std::uint64_t length, unsigned to) {
    const Bytes data = bytes_of(length, to);
    image.write(std::span(data).first(100), {at + 9});
    image.zero({at + 100}, 50, Image::Zero::may_trim, false);
    image.trim({at + 3}, length - 3);
    image.zero({at}, length, Image::Zero::keep_space, false);
    image.write(data, {at});
    image.trim({at}, length);
    image.write(data, {at});
    image.flush();
}

/// Guest clusters `mine` and `theirs` lie in one host cluster, with what counts the image may have: changing one leaves
/// the other as it was, whichever tables have been read before.
void check_apart(const BuiltImage &image, std::uint64_t mine, std::uint64_t theirs, bool read_theirs) {
    auto disk = std::make_shared<FaultyDisk>(image.bytes);
    auto opened = open_image(disk);
    const Bytes before = read_all(*opened);
    opened->close();
    opened = open_image(disk);
    if (read_theirs)
        read_some(*opened, theirs * cluster, cluster);
    change_in_every_way(*opened, mine * cluster, cluster, 7);
    opened->give_back();
    // What comes free is given to others, and must not be what they still use.
    for (std::uint64_t c = 150; c < 170; ++c)
        opened->write(bytes_of(cluster, 8), {c * cluster});
    opened->flush();
    opened->give_back();
    Bytes expected = before;
    std::fill_n(expected.begin() + static_cast<std::ptrdiff_t>(mine * cluster), cluster, std::byte{7});
    std::fill_n(expected.begin() + static_cast<std::ptrdiff_t>(150 * cluster), 20 * cluster, std::byte{8});
    CHECK((read_all(*opened) == expected));
    opened->close();
    CHECK((read_all(*open_image(disk)) == expected));
    INFO(judge(disk->bytes()).text());
    CHECK(judge(disk->bytes()).sound());
}

} // namespace

TEST_CASE("A host cluster that two guest clusters claim is written by neither") {
    for (const std::uint64_t theirs : {1, 9, 90}) // in the same table, and in another one
        for (const bool counted : {false, true})
            for (const bool read_theirs : {false, true}) {
                const std::uint64_t mine = 5;
                if (theirs == 90 && !counted && !read_theirs)
                    continue; // nothing has shown it: that is for the check to find
                INFO("with guest cluster " << theirs << (counted ? ", counted" : "") << (read_theirs ? ", read" : ""));
                BuiltImage image = sound_image();
                const std::uint64_t place = image.word(image.l2_entry_at(mine));
                image.set_word(image.l2_entry_at(theirs), place);
                if (counted) {
                    const std::uint64_t at = image.refcount_at((place & entry::offset_mask) / cluster);
                    image.bytes[at + 1] = std::byte{2};
                }
                check_apart(image, mine, theirs, read_theirs);
            }
}

TEST_CASE("A cluster that an entry calls its own, and a snapshot has, stays as the snapshot has it") {
    BuiltImage image = sound_image();
    image.bytes = with_snapshot(image.bytes, "s");
    const auto snapshots = snapshot_disks(image.bytes);
    BuiltImage lying = with_own_table(image);
    const std::uint64_t table = lying.word(lying.l1) & entry::offset_mask;
    const std::uint64_t at = table + 5 * 8;
    REQUIRE((lying.word(at) & entry::copied) == 0);
    lying.set_word(at, lying.word(at) | entry::copied);
    auto disk = std::make_shared<FaultyDisk>(lying.bytes);
    {
        auto opened = open_image(disk);
        change_in_every_way(*opened, 5 * cluster, cluster, 7);
        opened->close();
    }
    CHECK((snapshot_disks(disk->bytes()) == snapshots));
    CHECK(judge(disk->bytes()).sound());
}

TEST_CASE("Data that claims a cluster of compressed extents, or a snapshot's table, is copied away from it") {
    ImagePlan plan;
    plan.virtual_size = 200 * cluster;
    plan.map(50, 2);
    for (std::uint64_t c = 60; c < 64; ++c)
        plan.compressed[c] = 40;
    plan.compressed_at = 100;
    plan.metadata_at = 110;
    const BuiltImage sound = build_image(plan);
    for (const bool extents_first : {false, true}) {
        BuiltImage image = sound;
        image.set_word(image.l2_entry_at(5), entry::data({100 * cluster}));
        auto disk = std::make_shared<FaultyDisk>(image.bytes);
        auto opened = open_image(disk);
        const Bytes extents = read_some(*opened, 60 * cluster, 4 * cluster);
        if (extents_first) {
            opened->close();
            opened = open_image(disk);
            read_some(*opened, 60 * cluster, cluster);
        }
        change_in_every_way(*opened, 5 * cluster, cluster, 7);
        opened->close();
        CHECK((read_some(*open_image(disk), 60 * cluster, 4 * cluster) == extents));
    }
    BuiltImage image = sound;
    image.bytes = with_snapshot(image.bytes, "s");
    const auto snapshots = snapshot_disks(image.bytes);
    BuiltImage lying = with_own_table(image);
    const std::uint64_t table = lying.word(lying.l1) & entry::offset_mask;
    REQUIRE(table != image.l2_tables.at(0));
    lying.set_word(table + 5 * 8, entry::data({image.l2_tables.at(0)}));
    auto disk = std::make_shared<FaultyDisk>(lying.bytes);
    {
        auto opened = open_image(disk);
        change_in_every_way(*opened, 5 * cluster, cluster, 7);
        opened->give_back();
        opened->close();
    }
    CHECK((snapshot_disks(disk->bytes()) == snapshots));
}

TEST_CASE("Data that claims what a bitmap has is copied away from it, whether or not a bitmap is enabled") {
    BuiltImage image = sound_image(true);
    if (GENERATE(false, true)) // inconsistent, as after a kill
        store_be<std::uint32_t>(image.bytes, image.enabled_bitmap + 12,
                                BitmapEntry::flag_auto | BitmapEntry::flag_in_use);
    const std::uint64_t bits = image.word(image.word(image.disabled_bitmap));
    const Bytes stored(image.bytes.begin() + static_cast<std::ptrdiff_t>(bits),
                       image.bytes.begin() + static_cast<std::ptrdiff_t>(bits + cluster));
    image.set_word(image.l2_entry_at(5), entry::data({bits}) | entry::copied);
    const auto disk = std::make_shared<FaultyDisk>(image.bytes);
    {
        const auto opened = open_image(disk);
        change_in_every_way(*opened, 5 * cluster, cluster, 7);
        opened->close();
    }
    const Bytes after = disk->bytes();
    CHECK(std::equal(stored.begin(), stored.end(), after.begin() + static_cast<std::ptrdiff_t>(bits)));
}

TEST_CASE("An image whose tables share a cluster is only read") {
    const BuiltImage sound = sound_image();
    for (const std::uint64_t place : {sound.l2_tables.at(1), sound.refcount_table, sound.refcount_blocks.front()}) {
        BuiltImage image = sound;
        image.set_word(image.l1, place | entry::copied);
        auto disk = std::make_shared<FaultyDisk>(image.bytes);
        std::string refusal;
        try {
            open_image(disk);
        } catch (const Error &error) {
            refusal = error.what();
        }
        CHECK(refusal.find("two of its tables") != std::string::npos);
        CHECK((disk->bytes() == image.bytes));
        CHECK_NOTHROW(open_image(disk, true));
    }
}

TEST_CASE("Bits of which few are set are found at both ends of very many") {
    const std::uint64_t many = std::uint64_t{1} << 47;
    SparseBits bits(many);
    for (const std::uint64_t i : {std::uint64_t{0}, many / 2 - 1, many / 2, many - 1}) {
        CHECK_FALSE(bits.has(i));
        CHECK_FALSE(bits.set(i));
        CHECK(bits.set(i));
        CHECK(bits.has(i));
        CHECK_FALSE(bits.has(i ^ 1));
    }
    bits.clear(many - 1);
    bits.clear(many - 1);
    CHECK_FALSE(bits.has(many - 1));
    CHECK(bits.has(many / 2));
    CHECK_FALSE(bits.set(many));
    CHECK_FALSE(bits.has(many));
}

TEST_CASE("A trim of part of a cluster that two entries claim, one of them read, changes nothing of the other") {
    constexpr std::uint64_t size = 65536;
    ImagePlan plan;
    plan.cluster_bits = 16;
    plan.virtual_size = 700 * size;
    plan.extended = GENERATE(false, true);
    plan.metadata_at = 2;
    plan.map(700, 8);
    BuiltImage built = build_image(plan);
    built.set_word(built.l2_entry_at(600, 16), built.word(built.l2_entry_at(5, 16)));
    const auto image = open_image(std::make_shared<FaultyDisk>(built.bytes));
    const Bytes theirs = read_some(*image, 600 * size, size);
    image->trim({5 * size + 4096}, 4096);
    CHECK((read_some(*image, 600 * size, size) == theirs));
}

TEST_CASE(
    "What is done to part of a cluster that is counted twice changes nothing of a snapshot, whatever its flag says") {
    constexpr std::uint64_t size = 16384;
    const bool extended = GENERATE(false, true);
    const int how = GENERATE(0, 1, 2, 3, 4);
    INFO("extended " << extended << ", way " << how);
    ImagePlan plan;
    plan.cluster_bits = 14;
    plan.virtual_size = 40 * size;
    plan.extended = extended;
    plan.map(8, 2);
    plan.metadata_at = 20;
    auto disk = std::make_shared<FaultyDisk>(with_snapshot(build_image(plan).bytes, "before"));
    {
        const auto image = open_image(disk);
        image->write(bytes_of(size, 0x21), {0}); // a table of its own from now on
        image->close();
    }
    Bytes bytes = disk->bytes();
    const std::uint64_t l1 = load_be<std::uint64_t>(bytes, 40);
    const std::uint64_t table = load_be<std::uint64_t>(bytes, l1) & entry::offset_mask;
    const std::uint64_t five = table + 5 * (extended ? 16 : 8), word = load_be<std::uint64_t>(bytes, five);
    REQUIRE((word & entry::copied) == 0);
    store_be<std::uint64_t>(bytes, five, word | entry::copied);
    if (extended) { // the first half is data, and begins with zeroes
        store_be<std::uint64_t>(bytes, five + 8, 0x0000ffff);
        std::fill_n(bytes.begin() + static_cast<std::ptrdiff_t>(word & entry::offset_mask), 512, std::byte{0});
    }
    const auto theirs = [&](const Bytes &all) {
        const auto at = all.begin() + static_cast<std::ptrdiff_t>(word & entry::offset_mask);
        return Bytes(at, at + size);
    };
    const Bytes before = theirs(bytes);
    disk = std::make_shared<FaultyDisk>(bytes);
    const auto image = open_image(disk);
    Gauges gauges;
    const GuestOffset at{5 * size + 4096};
    if (how == 0)
        image->trim(at, 4096);
    else if (how == 1)
        image->zero(at, 4096, Image::Zero::may_trim, false);
    else if (how == 2)
        image->zero(at, 4096, Image::Zero::keep_space, false);
    else if (how == 3)
        image->write(bytes_of(4096, 0x42), at);
    else
        ZeroScan(*image, gauges).run({0}, image->size(), never);
    image->close();
    CHECK((theirs(disk->bytes()) == before));
}

TEST_CASE("Zeroes in subclusters of a cluster that two entries say they own are not given back") {
    constexpr std::uint64_t size = 16384, sub = 512;
    ImagePlan plan;
    plan.cluster_bits = 14;
    plan.virtual_size = 400 * size;
    plan.extended = true;
    plan.map(8, 2);
    plan.data[300] = 30;
    plan.metadata_at = 40;
    BuiltImage built = build_image(plan);
    // 5 has the first half of the host cluster, 300 the second; the refcount is right, both flags are not.
    const std::uint64_t five = built.l2_entry_at(5, 14), other = built.l2_entry_at(300, 14);
    const std::uint64_t word = built.word(five), host = (word & entry::offset_mask) / size;
    built.set_word(five + 8, 0x0000ffff);
    built.set_word(other, word);
    built.set_word(other + 8, 0xffff0000);
    built.bytes[built.refcount_at(host, 14) + 1] = std::byte{2};
    std::fill_n(built.bytes.begin() + static_cast<std::ptrdiff_t>(host * size), sub, std::byte{0});
    // Not by this one: what it has read, it knows to be claimed twice.
    const Bytes before = read_all(*open_image(std::make_shared<FaultyDisk>(built.bytes), true));
    const auto image = open_image(std::make_shared<FaultyDisk>(built.bytes));
    Gauges gauges;
    ZeroScan(*image, gauges).run({0}, 400 * size, never);
    CHECK((read_all(*image) == before));
}
