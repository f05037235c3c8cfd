// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Images with extended L2 entries: what their entries mean, and random requests against a model, in images whose host
// clusters are full of bytes that no subcluster shows.
#include "lib/byte_order.h"
#include "lib/error.h"
#include "lib/l2_entry.h"
#include "lib/subcluster_mapping.h"
#include "tests/catch.h"
#include "tests/fault/image_builder.h"
#include "tests/fault/image_judge.h"
#include "tests/fault/workloads.h"

#include <thread>

using namespace qlean;
using namespace qlean::fault;
using Kind = Mapping::Kind;

namespace {

constexpr std::uint64_t cluster = 16384, sub = 512, copied = std::uint64_t{1} << 63;

Mapping decoded(std::uint64_t entry, std::uint64_t bitmap) {
    return entry::decode({entry, bitmap}, {.cluster_bits = 14, .version = 3, .subclusters = true});
}

/// Half of the entries with a host cluster say that somebody else may use it.
ImagePlan mixed_plan(std::uint64_t seed) {
    ImagePlan plan;
    plan.cluster_bits = 14;
    plan.virtual_size = 30 * cluster + 700;
    plan.extended = true;
    std::mt19937_64 random(seed);
    for (std::uint64_t c = 0; c < plan.guest_clusters(); ++c) {
        if (random() % 3 != 0)
            plan.data[c] = 4 + (c * 7) % 31;
        if (random() % 4 != 0) {
            const std::uint64_t zero = random() & random() & 0xffffffff;
            plan.subclusters[c] = zero << 32 | (plan.data.contains(c) ? random() & ~zero & 0xffffffff : 0);
        }
    }
    return plan;
}

} // namespace

TEST_CASE("An extended entry says what each subcluster is, or is damaged") {
    CHECK(decoded(0, 0).kind == Kind::unallocated);
    CHECK(decoded(0, 0xffffffff00000000).kind == Kind::zero);
    CHECK(decoded(0, 0x0000000100000000).kind == Kind::mixed);
    CHECK(decoded(0x8000 | copied, 0xffffffff).kind == Kind::data);
    CHECK(decoded(0x8000 | copied, 0xffffffff).copied);
    CHECK(decoded(0x8000, 0xffffffff00000000).kind == Kind::zero_allocated);
    CHECK(decoded(0x8000, 0).kind == Kind::mixed_allocated); // as preallocation leaves it
    CHECK(decoded(0x8000, 0x8000000000000001).kind == Kind::mixed_allocated);
    CHECK(decoded(0x8000, 0x8000000000000001).bits == 0x8000000000000001);

    CHECK(decoded(0x8000, 0x0000000100000001).kind == Kind::damaged); // data and zero
    CHECK(decoded(0, 1).kind == Kind::damaged);                       // data, and no host cluster
    CHECK(decoded(0x8001, 0xffffffff).kind == Kind::damaged);         // the zero flag of plain entries
    CHECK(decoded(1, 0).kind == Kind::damaged);
    CHECK(decoded(0x8200, 1).kind == Kind::damaged);
    CHECK(decoded((std::uint64_t{1} << 62) | 0x10000, 0).kind == Kind::compressed);
    CHECK(decoded((std::uint64_t{1} << 62) | 0x10000, 1).kind == Kind::damaged);
}

TEST_CASE("A mapping and its bitmap say the same") {
    using namespace subclusters;
    CHECK(bitmap_of(decoded(0x8000, 0xffffffff)) == all_data);
    CHECK(bitmap_of(decoded(0x8000, 0xffffffff00000000)) == all_zero);
    CHECK(bitmap_of(decoded(0, 0)).word() == 0);
    CHECK(bitmap_of(decoded(0x8000, 0x300000004)).word() == 0x300000004);
    const Mapping m = decoded(0x8000 | copied, 0x300000004);
    CHECK(uniform(m, subclusters::Kind::data).writable_in_place());
    CHECK(uniform(m, subclusters::Kind::zero).kind == Mapping::Kind::zero_allocated);
    CHECK(uniform(m, subclusters::Kind::unallocated) == Mapping{});
    CHECK(uniform(decoded(0, 0x300000000), subclusters::Kind::zero).kind == Mapping::Kind::zero);
}

TEST_CASE("Extended entries in clusters that are too small are refused") {
    auto built = build_image(mixed_plan(1));
    store_be<std::uint32_t>(std::span(built.bytes), 20, 13);
    CHECK_THROWS_AS(open_image(std::make_shared<FaultyDisk>(built.bytes)), Error);
}

TEST_CASE("What no subcluster shows is never read, whatever the requests") {
    for (std::uint64_t seed = 1; seed <= 12; ++seed) {
        auto built = build_image(mixed_plan(seed));
        std::mt19937_64 random(seed);
        for (std::uint64_t c = 0; c < 31; ++c) // a flag that is clear means: copy it
            if (const auto at = built.l2_entry_at(c, 14); built.word(at) != 0 && random() % 2)
                built.set_word(at, built.word(at) & ~copied);
        REQUIRE(judge(built.bytes).sound());
        const auto disk = std::make_shared<FaultyDisk>(built.bytes);
        Bytes model = guest_bytes(built.bytes);
        auto image = open_image(disk);
        REQUIRE((read_all(*image) == model));
        for (int n = 0; n < 400; ++n) {
            const std::uint64_t at = random() % model.size() / (n % 2 ? 1 : sub) * (n % 2 ? 1 : sub);
            std::uint64_t length = 1 + random() % (n % 8 == 0 ? 3 * cluster : 4 * sub);
            if (n % 2 == 0)
                length = round_up(length, sub);
            length = std::min(length, model.size() - at);
            const std::span<std::byte> part = std::span(model).subspan(at, length);
            switch (random() % 4) {
            case 0:
            case 1: {
                const Bytes bytes = bytes_of(length, static_cast<unsigned>(1 + random() % 255));
                image->write(bytes, {at});
                std::copy(bytes.begin(), bytes.end(), part.begin());
                break;
            }
            case 2:
                image->zero({at}, length, random() % 2 ? Image::Zero::may_trim : Image::Zero::keep_space, random() % 2);
                std::fill(part.begin(), part.end(), std::byte{0});
                break;
            case 3: {
                image->trim({at}, length);
                const Bytes left = read_some(*image, at, length);
                for (std::uint64_t i = 0; i < length; ++i)
                    REQUIRE((left[i] == part[i] || left[i] == std::byte{0}));
                std::copy(left.begin(), left.end(), part.begin());
                break;
            }
            }
            if (n == 200)
                compact_all(*image);
            if (n == 300)
                zero_scan_all(*image);
        }
        INFO("seed " << seed);
        REQUIRE((read_all(*image) == model));
        image->close();
        image.reset();
        const Bytes after = disk->bytes();
        INFO(judge(after).text());
        REQUIRE(judge(after).clean());
        REQUIRE((guest_bytes(after) == model));
    }
}

TEST_CASE("A write to one subcluster writes one subcluster") {
    const auto disk = std::make_shared<FaultyDisk>(empty_image(64 * cluster, 2 * 1024 * 1024, 3, true));
    auto image = open_image(disk);
    image->write(bytes_of(100, 7), {70000}); // in the second subcluster of 64 KiB
    const auto extents = image->extents({0}, image->size(), 10);
    REQUIRE(extents.size() == 2 + 1);
    CHECK(extents[1].at.value == 65536);
    CHECK(extents[1].length == 65536);
    CHECK(extents[1].allocated);
    CHECK(extents[0].zero);
    CHECK(extents[2].zero);
    CHECK_FALSE(extents[0].allocated);
}

TEST_CASE("A cluster is given back when its last subcluster is") {
    const auto disk = std::make_shared<FaultyDisk>(empty_image(8 * cluster, cluster, 3, true));
    auto image = open_image(disk);
    image->write(bytes_of(cluster, 9), {cluster});
    image->flush();
    for (unsigned i = 0; i < 32; ++i) {
        CHECK(image->state().allocator.retired_bytes() == 0);
        image->trim({cluster + (i * 5) % 32 * sub}, sub);
    }
    CHECK(image->state().allocator.retired_bytes() == cluster);
    CHECK((read_some(*image, cluster, cluster) == bytes_of(cluster, 0)));
    image->close();
    CHECK(judge(disk->bytes()).clean());
}

TEST_CASE("A cluster that a snapshot has too loses one reference, however it is given up") {
    enum How { write, trim, zero, zero_in_place };
    struct Change {
        How how;
        std::uint64_t within, length;
    };
    const std::uint64_t c = GENERATE(5, 10); // the latter is compressed
    ImagePlan plan;
    plan.cluster_bits = 14;
    plan.extended = true;
    plan.virtual_size = 16 * cluster;
    plan.map(8, 4);
    plan.subclusters[6] = 0x00ff; // in part
    plan.compressed = {{10, 0}, {11, 40}};
    plan.compressed_at = 20;
    const Bytes image = with_snapshot(build_image(plan).bytes, "s");
    const auto snapshots = snapshot_disks(image);
    const Bytes before = guest_bytes(image);
    for (const auto &[how, within, length] : std::vector<Change>{{write, 0, cluster},
                                                                 {write, 3 * sub, sub},
                                                                 {write, 3 * sub + 9, 40},
                                                                 {trim, 0, 2 * cluster},
                                                                 {trim, sub, 4 * sub},
                                                                 {zero, 0, 2 * cluster},
                                                                 {zero, sub, 4 * sub + 7},
                                                                 {zero, sub + 7, 9},
                                                                 {zero_in_place, 0, 2 * cluster},
                                                                 {zero_in_place, sub, 4 * sub + 7}}) {
        INFO("how " << how << " cluster " << c << " at " << within << " length " << length);
        const auto disk = std::make_shared<FaultyDisk>(image);
        auto opened = open_image(disk);
        const GuestOffset at{c * cluster + within};
        switch (how) {
        case write:
            opened->write(bytes_of(length, 9), at);
            break;
        case trim:
            opened->trim(at, length);
            break;
        case zero:
            opened->zero(at, length, Image::Zero::may_trim, false);
            break;
        case zero_in_place:
            opened->zero(at, length, Image::Zero::keep_space, false);
            break;
        }
        const Bytes now = read_all(*opened);
        opened->close();
        std::uint64_t wrong = 0;
        for (std::uint64_t b = 0; b < now.size(); ++b) {
            const bool changed = b >= at.value && b < at.value + length;
            const std::byte right = !changed ? before[b] : std::byte(how == write ? 9 : 0);
            wrong += now[b] != right && !(changed && how == trim && now[b] == before[b]);
        }
        CHECK(wrong == 0);
        CHECK((guest_bytes(disk->bytes()) == now));
        CHECK((snapshot_disks(disk->bytes()) == snapshots));
        const Verdict verdict = judge(disk->bytes());
        INFO(verdict.text());
        CHECK(verdict.clean());
    }
}

TEST_CASE("The two words of an entry are read as one store left them") {
    const auto disk = std::make_shared<FaultyDisk>(empty_image(64 * cluster, cluster, 3, true));
    auto image = open_image(disk);
    image->write(bytes_of(cluster, 1), {0});
    State &state = image->state();
    std::atomic<bool> done{false};
    std::thread writer([&] {
        // Beside the walk, as a guest does it: the entry goes from data to nothing and back.
        for (int i = 0; i < 20000; ++i) {
            Mapper::Editor editor(state.mapper, {1}, 1);
            if (i % 2)
                editor.set_words({1}, {0x8000 | copied, 0x00000000ffffffff});
            else
                editor.set_words({1}, {0, 0xffffffff00000000});
        }
        Mapper::Editor(state.mapper, {1}, 1).set_unallocated({1});
        done = true;
    });
    std::uint64_t torn = 0;
    while (!done) {
        Mapping m;
        state.mapper.survey({1}, std::span(&m, 1));
        torn += m.kind != Kind::data && m.kind != Kind::zero && m.kind != Kind::unallocated;
    }
    writer.join();
    CHECK(torn == 0);
}
