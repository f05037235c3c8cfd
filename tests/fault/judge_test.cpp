// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Who judges the judges: planted corruptions that the judge and qemu-img must both see, sound images that neither
// may blame, and a power-cut model that leaves exactly the images it promises.
#include "lib/byte_order.h"
#include "tests/fault/scene.h"

using namespace qlean;
using namespace qlean::fault;

namespace {

constexpr std::uint64_t copied = std::uint64_t{1} << 63;

ImagePlan small_plan() {
    ImagePlan plan;
    plan.virtual_size = 128 * 512;
    for (std::uint64_t c = 0; c < 128; c += 2)
        plan.data[c] = 8 + c;
    return plan;
}

/// Both judges agree about `image`.
void require_agreement(const Bytes &image, bool sound) {
    const Verdict verdict = judge(image);
    INFO(verdict.text());
    CHECK(verdict.sound() == sound);
    const auto qemu = ask_qemu(image);
    if (!qemu.available) {
        WARN("no qemu-img here: the judge is not compared with it");
        return;
    }
    INFO(qemu.output);
    CHECK((qemu.status == 0 || qemu.status == 3) == sound);
    if (sound)
        CHECK((qemu.status == 3) == (verdict.leaks > 0));
}

} // namespace

TEST_CASE("The judges agree that built, created and used images are clean") {
    require_agreement(build_image(small_plan()).bytes, true);
    ImagePlan old = small_plan();
    old.version = 2;
    require_agreement(build_image(old).bytes, true);
    for (const std::uint64_t size : {512, 4096, 65536})
        require_agreement(empty_image(1 << 20, size), true);
    Scene s(empty_image(1 << 18, 512));
    for (int i = 0; i < 100; ++i)
        s.guest->step({});
    s.guest->flush();
    require_agreement(s.disk->bytes(), true);
    CHECK((guest_bytes(s.disk->bytes()) == s.guest->now()));
    s.image->close();
    CHECK(judge(s.disk->bytes()).clean());
    require_agreement(s.disk->bytes(), true);
}

TEST_CASE("The judges agree about planted corruptions") {
    const auto plant = [](const std::function<void(BuiltImage &)> &damage, bool sound = false) {
        BuiltImage built = build_image(small_plan());
        damage(built);
        require_agreement(built.bytes, sound);
    };
    const auto refcount = [](std::uint64_t cluster, std::uint16_t count) {
        return [=](BuiltImage &b) { store_be<std::uint16_t>(b.bytes, b.refcount_at(cluster), count); };
    };
    SECTION("a data cluster without a refcount") { plant(refcount(8, 0)); }
    SECTION("a COPIED cluster with two refcounts") { plant(refcount(8, 2)); }
    SECTION("the header without a refcount") { plant(refcount(0, 0)); }
    SECTION("an L2 table without a refcount") {
        plant([](BuiltImage &b) { store_be<std::uint16_t>(b.bytes, b.refcount_at(b.l2_tables[0] / 512), 0); });
    }
    SECTION("a refcount block without a refcount") {
        plant([](BuiltImage &b) { store_be<std::uint16_t>(b.bytes, b.refcount_at(b.refcount_blocks[0] / 512), 0); });
    }
    SECTION("two guest clusters in one host cluster") {
        plant([](BuiltImage &b) { b.set_word(b.l2_entry_at(2), b.word(b.l2_entry_at(0))); });
    }
    SECTION("a guest cluster in an L2 table") {
        plant([](BuiltImage &b) { b.set_word(b.l2_entry_at(2), b.l2_tables[1] | copied); });
    }
    SECTION("an entry beyond the end of the file") {
        plant([](BuiltImage &b) { b.set_word(b.l2_entry_at(2), (b.bytes.size() + 5120) | copied); });
    }
    SECTION("an entry that is not at a cluster boundary") {
        BuiltImage built = build_image(small_plan());
        ImagePlan plan = small_plan();
        plan.cluster_bits = 12;
        plan.virtual_size = 128 * 4096;
        built = build_image(plan);
        built.set_word(built.l2_entry_at(2, 12), built.word(built.l2_entry_at(2, 12)) + 512);
        require_agreement(built.bytes, false);
    }
    SECTION("a refcount block that is not at a cluster boundary") {
        ImagePlan plan = small_plan();
        plan.cluster_bits = 12;
        plan.virtual_size = 128 * 4096;
        BuiltImage built = build_image(plan);
        built.set_word(built.refcount_table, built.refcount_blocks[0] + 512);
        require_agreement(built.bytes, false);
    }
    SECTION("a leak") { plant(refcount(9, 1), true); }
}

TEST_CASE("The judge allows refcount one with COPIED clear, which qemu-img does not") {
    BuiltImage built = build_image(small_plan());
    built.set_word(built.l2_entry_at(2), built.word(built.l2_entry_at(2)) & ~copied);
    CHECK(judge(built.bytes).clean());
    const auto qemu = ask_qemu(built.bytes);
    if (qemu.available)
        CHECK(qemu.status == 2);
}

TEST_CASE("Random damage to the tables: what qemu-img calls sound the judge calls sound, and the reverse") {
    const std::uint64_t seed = fresh_seed();
    INFO("QLEAN_SEED=" << seed);
    std::mt19937_64 random(seed);
    for (int i = 0; i < 60; ++i) {
        BuiltImage built = build_image(small_plan());
        INFO("round " << i);
        if (random() % 2) { // the refcount of a cluster
            const std::uint64_t c = random() % (built.bytes.size() / 512);
            store_be<std::uint16_t>(built.bytes, built.refcount_at(c), static_cast<std::uint16_t>(random() % 3));
        } else { // where a guest cluster is
            const std::uint64_t c = random() % 128, to = random() % (built.bytes.size() / 512 + 4);
            built.set_word(built.l2_entry_at(c), to == 0 ? 0 : (to * 512 | (random() % 8 ? copied : 0)));
        }
        const auto qemu = ask_qemu(built.bytes);
        if (!qemu.available)
            return;
        const Verdict verdict = judge(built.bytes);
        INFO(verdict.text() << "\n" << qemu.output);
        const bool only_flag = qemu.output.find("OFLAG_COPIED") != std::string::npos && verdict.sound();
        if (!only_flag) // the one thing in which they differ
            CHECK((qemu.status == 0 || qemu.status == 3) == verdict.sound());
    }
}

// --- the model of power cuts --------------------------------------------------------------------------------------

namespace {

Bytes sector_of(unsigned value) { return bytes_of(512, value); }
unsigned at(const Bytes &image, std::uint64_t sector) { return std::to_integer<unsigned>(image[sector * 512]); }
Fate yes() { return {true, {}}; }
Fate no() { return {}; }

} // namespace

TEST_CASE("C10: any subset of what was not synced, overlapping changes in order") {
    const auto disk = std::make_shared<FaultyDisk>(bytes_of(4 * 512, 0));
    disk->record();
    FaultyFile file(disk);
    file.write(sector_of(1), HostOffset{0});
    file.sync();
    file.write(sector_of(2), HostOffset{0});
    file.write(sector_of(3), HostOffset{512});
    file.write(sector_of(4), HostOffset{0});
    PowerCuts cuts(*disk);
    cuts.move_to(1); // before the sync: even the first is uncertain
    CHECK(cuts.uncertain().size() == 1);
    cuts.move_to(cuts.moments() - 1);
    REQUIRE(cuts.uncertain().size() == 3);
    const auto left = [&](Fate a, Fate b, Fate c) {
        const Bytes image = cuts.image({a, b, c});
        return std::pair{at(image, 0), at(image, 1)};
    };
    CHECK(left(no(), no(), no()) == std::pair{1u, 0u});
    CHECK(left(yes(), no(), no()) == std::pair{2u, 0u});
    CHECK(left(no(), no(), yes()) == std::pair{4u, 0u});
    CHECK(left(yes(), yes(), yes()) == std::pair{4u, 3u}); // never 2 over 4
    CHECK(left(no(), yes(), no()) == std::pair{1u, 3u});
    const Bytes killed = cuts.image_of_killed();
    CHECK(at(killed, 0) == 4);
}

TEST_CASE("C10: torn writes, parts of a sector carried along") {
    const auto disk = std::make_shared<FaultyDisk>(bytes_of(3 * 512, 0));
    disk->record();
    FaultyFile file(disk);
    file.write(bytes_of(1536, 1), HostOffset{0});
    file.write(bytes_of(10, 2), HostOffset{100});
    PowerCuts cuts(*disk);
    cuts.move_to(2);
    const Bytes torn = cuts.image({{true, {true, false, true}}, no()});
    CHECK(at(torn, 0) == 1);
    CHECK(at(torn, 1) == 0);
    CHECK(at(torn, 2) == 1);
    const Bytes later = cuts.image({no(), yes()}); // the sector as it was in memory, other sectors not
    CHECK(at(later, 0) == 1);
    CHECK(std::to_integer<unsigned>(later[100]) == 2);
    CHECK(at(later, 1) == 0);
}

TEST_CASE("C10: truncations and punches reach the disk early or late, the length in order") {
    const auto disk = std::make_shared<FaultyDisk>(bytes_of(4 * 512, 9));
    disk->record();
    FaultyFile file(disk);
    file.truncate(512);
    file.truncate(4 * 512);
    file.write(sector_of(5), HostOffset{3 * 512});
    file.punch(HostOffset{0}, 512);
    PowerCuts cuts(*disk);
    cuts.move_to(4);
    Bytes image = cuts.image({yes(), no(), no(), yes()});
    CHECK(image.size() == 512);
    CHECK(at(image, 0) == 0);
    image = cuts.image({no(), no(), no(), no()});
    CHECK(image.size() == 4 * 512);
    CHECK(at(image, 2) == 9);
    image = cuts.image({no(), yes(), yes(), no()}); // the second length carries the first
    CHECK(image.size() == 4 * 512);
    CHECK(at(image, 0) == 9);
    CHECK(at(image, 2) == 0);
    CHECK(at(image, 3) == 5);
}

TEST_CASE("C10: a sync covers what returned before it started; one that fails covers nothing, for ever") {
    const auto disk = std::make_shared<FaultyDisk>(bytes_of(4 * 512, 0));
    disk->record();
    FaultyFile file(disk);
    file.write(sector_of(1), HostOffset{0});
    const int hook = disk->add_hook(true, [&](const Request &r) {
        if (r.op == Op::sync)
            file.write(sector_of(2), HostOffset{512}); // while the sync is under way
    });
    file.sync();
    disk->remove_hook(hook);
    PowerCuts cuts(*disk);
    cuts.move_to(cuts.moments() - 1);
    REQUIRE(cuts.uncertain().size() == 1);
    CHECK(cuts.uncertain()[0]->at == 512);

    Fault fault;
    fault.ops = mask(Op::sync);
    disk->fail(fault);
    CHECK_THROWS_AS(file.sync(), Error);
    file.sync();
    PowerCuts after(*disk);
    after.move_to(after.moments() - 1);
    CHECK(after.uncertain().size() == 1);
}
