// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Repairing a file: whatever is wrong, and at whatever moment the power is cut, the guest's disk stays what the image
// said it was, and the next repair ends with a clean image. (What counts as wrong is compared with QEMU elsewhere.)
#include "lib/byte_order.h"
#include "lib/check/check.h"
#include "lib/error.h"
#include "lib/l2_entry.h"
#include "tests/fault/scene.h"

#include <random>

using namespace qlean;
using namespace qlean::fault;

namespace {

constexpr std::uint64_t cluster = 512;

BuiltImage sound_image() {
    ImagePlan plan;
    plan.virtual_size = 160 * cluster; // three L2 tables
    for (std::uint64_t c = 0; c < 150; c += 1 + c % 3)
        plan.data[c] = 2 + c;
    plan.metadata_at = 160;
    return build_image(plan);
}

void set_refcount(BuiltImage &image, std::uint64_t c, unsigned count) {
    store_be(std::span(image.bytes), image.refcount_at(c), static_cast<std::uint16_t>(count));
}

struct Damage {
    const char *name;
    std::function<void(BuiltImage &)> make;
};

/// Entry of guest cluster 1, which has data of its own.
std::uint64_t entry_at(const BuiltImage &image) { return image.l2_entry_at(1); }

const std::vector<Damage> damages = {
    {"refcounts of data too low",
     [](BuiltImage &i) {
         for (std::uint64_t c = 2; c < 40; ++c)
             set_refcount(i, c, 0);
     }},
    {"refcounts of metadata too low",
     [](BuiltImage &i) {
         set_refcount(i, 0, 0);
         set_refcount(i, i.l1 / cluster, 0);
         set_refcount(i, i.refcount_table / cluster, 0);
         set_refcount(i, i.refcount_blocks.front() / cluster, 0);
     }},
    {"refcounts too high",
     [](BuiltImage &i) {
         set_refcount(i, 3, 2);
         set_refcount(i, 155, 1);
         set_refcount(i, 156, 7);
     }},
    {"a cluster used twice", [](BuiltImage &i) { i.set_word(i.l2_entry_at(5), i.word(entry_at(i))); }},
    {"data in the L1 table", [](BuiltImage &i) { i.set_word(entry_at(i), entry::data({i.l1})); }},
    {"data in its own L2 table", [](BuiltImage &i) { i.set_word(entry_at(i), entry::data({i.l2_tables.at(0)})); }},
    {"data in another L2 table", [](BuiltImage &i) { i.set_word(entry_at(i), entry::data({i.l2_tables.at(1)})); }},
    {"data in a refcount block",
     [](BuiltImage &i) { i.set_word(entry_at(i), entry::data({i.refcount_blocks.front()})); }},
    {"data in the refcount table", [](BuiltImage &i) { i.set_word(entry_at(i), entry::data({i.refcount_table})); }},
    {"an L2 table used twice", [](BuiltImage &i) { i.set_word(i.l1 + 8, i.word(i.l1)); }},
    {"flags missing",
     [](BuiltImage &i) {
         i.set_word(entry_at(i), i.word(entry_at(i)) & ~entry::copied);
         i.set_word(i.l1, i.word(i.l1) & ~entry::copied);
     }},
    {"a refcount block lost", [](BuiltImage &i) { i.set_word(i.refcount_table, 0); }},
    {"a refcount table entry that is no block", [](BuiltImage &i) { i.set_word(i.refcount_table, 0x101); }},
    {"a refcount block beyond the end", [](BuiltImage &i) { i.set_word(i.refcount_table + 8, 1 << 20); }},
    {"a misaligned zero cluster is not possible here, but the dirty mark", [](BuiltImage &i) { i.set_word(72, 1); }},
    {"the corrupt mark", [](BuiltImage &i) { i.set_word(72, 2); }},
};

CheckReport repair(const std::shared_ptr<FaultyDisk> &disk, Repair how) {
    FaultyFile file(disk);
    return repair_file(file, how);
}

/// As the judge sees it, who knows nothing of clusters that are shared, as a repair leaves what was used twice.
bool is_clean(const Bytes &image) {
    Verdict verdict = judge(image);
    std::erase_if(verdict.corruptions, [](const std::string &text) {
        return text.find("which something else uses as well") != std::string::npos;
    });
    return verdict.clean();
}

void require_clean(const Bytes &image, const Bytes &guest) {
    INFO(judge(image).text());
    CHECK(is_clean(image));
    CHECK((guest_bytes(image) == guest));
    CHECK(load_be<std::uint64_t>(image, 72) == 0);
}

} // namespace

TEST_CASE("What is damaged is repaired, and the guest's disk is what it was") {
    for (const Damage &damage : damages) {
        INFO(damage.name);
        BuiltImage image = sound_image();
        damage.make(image);
        const Bytes guest = guest_bytes(image.bytes);
        auto disk = std::make_shared<FaultyDisk>(image.bytes);
        const CheckReport report = repair(disk, Repair::all);
        CHECK(report.clean());
        require_clean(disk->bytes(), guest);
        const auto qemu = ask_qemu(disk->bytes());
        if (qemu.available) {
            INFO(qemu.output);
            CHECK(qemu.status == 0);
        }
        // Nothing is left to do.
        const std::uint64_t changes = disk->count(any_change);
        CHECK(repair(disk, Repair::all).clean());
        CHECK(disk->count(any_change) == changes);
    }
}

TEST_CASE("A repair that is cut off at any moment is finished by the next one") {
    const std::uint64_t seed = fresh_seed();
    INFO("QLEAN_SEED=" << seed);
    std::mt19937_64 random(seed);
    for (const Damage &damage : damages) {
        BuiltImage image = sound_image();
        damage.make(image);
        const Bytes guest = guest_bytes(image.bytes);
        auto disk = std::make_shared<FaultyDisk>(image.bytes);
        disk->record();
        repair(disk, Repair::all);
        PowerCuts cuts(*disk);
        for (std::size_t moment = 0; moment < cuts.moments(); ++moment) {
            cuts.move_to(moment);
            for (int way = 0; way < 4; ++way) {
                INFO(damage.name << ", moment " << moment << ", way " << way);
                const Bytes left = way == 0 ? cuts.image_of_killed() : cuts.image(random_fates(cuts, random));
                CHECK((guest_bytes(left) == guest));
                auto again = std::make_shared<FaultyDisk>(left);
                CHECK(repair(again, Repair::all).clean());
                require_clean(again->bytes(), guest);
            }
        }
    }
}

TEST_CASE("A repair that fails leaves what the next one repairs") {
    for (const Damage &damage : damages) {
        BuiltImage image = sound_image();
        damage.make(image);
        const Bytes guest = guest_bytes(image.bytes);
        for (std::uint64_t nth = 1;; ++nth) {
            INFO(damage.name << ", the change that fails is number " << nth);
            auto disk = std::make_shared<FaultyDisk>(image.bytes);
            Fault fault;
            fault.nth = nth;
            fault.lasting = true;
            disk->fail(fault);
            bool failed = false;
            try {
                repair(disk, Repair::all);
            } catch (const Error &) {
                failed = true;
            }
            disk->heal();
            CHECK(failed == disk->struck());
            repair(disk, Repair::all);
            require_clean(disk->bytes(), guest);
            if (!failed)
                break;
        }
    }
}

TEST_CASE("Leaks are repaired alone, unless there is worse") {
    BuiltImage image = sound_image();
    set_refcount(image, 155, 1);
    set_refcount(image, 156, 3);
    auto disk = std::make_shared<FaultyDisk>(image.bytes);
    const CheckReport report = repair(disk, Repair::leaks);
    CHECK(report.clean());
    CHECK(report.leaks_fixed == 2);
    CHECK(judge(disk->bytes()).clean());

    set_refcount(image, 3, 0);
    disk = std::make_shared<FaultyDisk>(image.bytes);
    const CheckReport worse = repair(disk, Repair::leaks);
    CHECK(worse.corruptions == 2); // the flag of the entry does not fit either
    CHECK(worse.leaks == 2);
    CHECK((disk->bytes() == image.bytes));
}

TEST_CASE("What an unknown header extension may own is not taken for a leak") {
    ImagePlan plan;
    plan.data[0] = 5;
    plan.leaked = {7, 9};
    plan.unknown_extension = 0x12345678;
    BuiltImage image = build_image(plan);
    set_refcount(image, 5, 0);
    auto disk = std::make_shared<FaultyDisk>(image.bytes);
    const CheckReport report = repair(disk, Repair::all);
    CHECK(report.corruptions == 0);
    CHECK(report.leaks == 2);
    CHECK(judge(disk->bytes()).leaks == 2);
}

TEST_CASE("A dirty image is repaired when it is opened for writing, and only then; a corrupt one is not opened") {
    BuiltImage image = sound_image();
    image.set_word(72, 1);
    set_refcount(image, 3, 0);
    const Bytes guest = guest_bytes(image.bytes);
    auto disk = std::make_shared<FaultyDisk>(image.bytes);
    CHECK((read_all(*open_image(disk, true)) == guest));
    CHECK((disk->bytes() == image.bytes));
    {
        Image::Options options;
        options.repair = Repair::none;
        CHECK_THROWS_AS(Image::open(std::make_unique<FaultyFile>(disk), options), Error);
        CHECK((disk->bytes() == image.bytes));
    }
    disk->record();
    CHECK((read_all(*open_image(disk)) == guest));
    CHECK(judge(disk->bytes()).clean());

    image.set_word(72, 2);
    disk = std::make_shared<FaultyDisk>(image.bytes);
    CHECK_THROWS_AS(open_image(disk), Error);
    CHECK((read_all(*open_image(disk, true)) == guest));
    CHECK((disk->bytes() == image.bytes));
    Image::Options options;
    options.repair = Repair::all;
    CHECK((read_all(*Image::open(std::make_unique<FaultyFile>(disk), options)) == guest));
    CHECK(judge(disk->bytes()).clean());
}

TEST_CASE("No bytes make the check do worse than to complain") {
    const std::uint64_t seed = fresh_seed();
    INFO("QLEAN_SEED=" << seed);
    std::mt19937_64 random(seed);
    const BuiltImage sound = sound_image();
    for (int i = 0; i < 3000; ++i) {
        Bytes bytes = sound.bytes;
        for (auto n = 1 + random() % 6; n > 0; --n) {
            const std::uint64_t where[] = {0,
                                           sound.l1,
                                           sound.refcount_table,
                                           sound.refcount_blocks.front(),
                                           sound.l2_tables.at(0),
                                           sound.l2_tables.at(1)};
            const std::uint64_t at = where[random() % 6] + random() % 64;
            bytes[at] = random() % 2 ? std::byte(random()) : bytes[at] ^ std::byte(1u << random() % 8);
        }
        auto disk = std::make_shared<FaultyDisk>(bytes);
        try {
            const CheckReport report = repair(disk, Repair::all);
            INFO(judge(disk->bytes()).text());
            if (report.clean() && !is_clean(disk->bytes())) { // something that the judge does not know
                const auto qemu = ask_qemu(disk->bytes());
                INFO(qemu.output);
                CHECK((!qemu.available || qemu.status == 0));
            }
        } catch (const Error &) {
        }
    }
}
