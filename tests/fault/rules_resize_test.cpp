// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// A resize that fails at any point leaves the old disk or the new one, and nothing is lost; tried again, it succeeds.
#include "lib/byte_order.h"
#include "tests/fault/image_judge.h"
#include "tests/fault/scene.h"

using namespace qlean;
using namespace qlean::fault;

namespace {

constexpr std::uint64_t old_size = 100 * 1024, new_size = 3 * 1024 * 1024;

Bytes image(bool bitmaps) {
    ImagePlan plan;
    plan.virtual_size = old_size;
    plan.map_all(10);
    plan.bitmaps = bitmaps;
    return build_image(plan).bytes;
}

} // namespace

TEST_CASE("resize: a fault at any point leaves the old disk or the new one") {
    for (const bool bitmaps : {false, true})
        for (const Op op : {Op::write, Op::read, Op::truncate, Op::sync})
            for (std::uint64_t nth = 1;; ++nth) {
                INFO("bitmaps " << bitmaps << ", operation " << static_cast<int>(op) << ", number " << nth);
                const auto disk = std::make_shared<FaultyDisk>(image(bitmaps));
                auto opened = open_image(disk);
                opened->write(bytes_of(1000, 7), {5000});
                Bytes model = read_all(*opened);
                Fault fault;
                fault.ops = mask(op);
                fault.nth = nth;
                fault.code = EIO;
                disk->fail(fault);
                bool failed = false, reported = false; // that a bitmap stays inconsistent
                opened->on_background_error([&](const std::exception &) { reported = true; });
                try {
                    opened->resize(new_size);
                } catch (const Error &) {
                    failed = true;
                }
                const bool struck = disk->struck();
                disk->heal();
                CHECK((failed || reported) == struck);
                CHECK(read_some(*opened, 0, old_size) == model);
                if (!opened->state().write_back.poisoned()) {
                    CHECK(opened->size() == (failed ? old_size : new_size));
                    // A bitmap that was caught half-way is inconsistent, and must be removed first.
                    bool resized = true;
                    try {
                        opened->resize(new_size);
                    } catch (const Error &) {
                        resized = false;
                    }
                    CHECK((resized || bitmaps));
                    model.resize(opened->size());
                    opened->write(bytes_of(3000, 9), {opened->size() - 3000});
                    std::fill(model.end() - 3000, model.end(), std::byte{9});
                    CHECK(read_all(*opened) == model);
                    opened->close();
                    const auto verdict = judge(disk->bytes());
                    INFO(verdict.text());
                    CHECK(verdict.clean());
                }
                opened.reset();
                CHECK(judge(disk->bytes()).sound());
                if (!struck)
                    break;
            }
}

TEST_CASE("resize: a shared table that was copied and not committed is not relied on after the failure") {
    ImagePlan plan;
    plan.virtual_size = old_size;
    plan.map_all(10);
    const auto disk = std::make_shared<FaultyDisk>(with_snapshot(build_image(plan).bytes, "one"));
    constexpr std::uint64_t cluster = 512, within = 195 * cluster;
    constexpr std::uint64_t larger = old_size + 8 * cluster; // the same last L2 table, and no longer L1 table
    auto opened = open_image(disk);
    Bytes model = read_all(*opened);
    // What reserves space is the copy of the table, which is written next; then nothing works any more.
    const int hook = disk->add_hook(true, [&](const Request &request) {
        if (request.op != Op::reserve)
            return;
        Fault fault;
        fault.ops = mask(Op::write);
        fault.nth = 2;
        fault.lasting = true;
        disk->fail(fault);
    });
    CHECK_THROWS_AS(opened->resize(larger), Error);
    disk->remove_hook(hook);
    REQUIRE(disk->struck());
    disk->heal();
    CHECK_FALSE(opened->state().write_back.poisoned());
    CHECK(opened->size() == old_size);
    CHECK((read_all(*opened) == model));
    opened->write(bytes_of(cluster, 9), {within}); // an entry of that table
    std::fill_n(model.begin() + within, cluster, std::byte{9});
    opened->flush();
    CHECK((read_all(*open_image(std::make_shared<FaultyDisk>(disk->bytes()))) == model));
    opened->resize(larger);
    model.resize(larger);
    CHECK((read_all(*opened) == model));
    opened->close();
    opened.reset();
    const auto verdict = judge(disk->bytes());
    INFO(verdict.text());
    CHECK(verdict.sound());
}

TEST_CASE("resize: bitmaps whose storing failed half-way are in use again before the guest goes on") {
    const Bytes original = image(true);
    std::uint64_t struck = 0;
    for (std::uint64_t nth = 1;; ++nth) {
        INFO("write " << nth);
        const auto disk = std::make_shared<FaultyDisk>(original);
        disk->record();
        auto opened = open_image(disk);
        opened->write(bytes_of(1000, 7), {5000});
        opened->flush();
        Fault fault;
        fault.ops = mask(Op::write);
        fault.nth = nth;
        fault.partial = 1 << 20; // it has written all, and says that it failed
        disk->fail(fault);
        try {
            opened->resize(new_size);
        } catch (const Error &) {
        }
        if (!disk->struck())
            break;
        ++struck;
        disk->heal();
        if (opened->state().write_back.poisoned())
            continue;
        opened->write(bytes_of(1000, 8), {40000});
        opened->flush();
        opened.reset(); // killed
        if (load_be<std::uint64_t>(disk->bytes(), 24) == old_size) {
            const auto wrong = judge_bitmaps(disk->bytes(), original);
            INFO(wrong.value_or("right"));
            CHECK_FALSE(wrong.has_value());
        }
    }
    CHECK(struck > 10);
}

TEST_CASE("resize: what cannot be made anew ends no server") {
    ImagePlan plan;
    plan.virtual_size = old_size;
    plan.map_all(10);
    const BuiltImage built = build_image(plan);
    const auto disk = std::make_shared<FaultyDisk>(built.bytes);
    const auto opened = open_image(disk);
    const Bytes model = read_all(*opened);
    const auto l1 = built.word(40), first = built.word(l1);
    REQUIRE(first != built.word(l1 + 8));
    const std::uint64_t word = big_endian(first);
    FaultyFile(disk).write(std::as_bytes(std::span(&word, 1)), HostOffset{l1 + 8}); // two entries, one table
    CHECK_THROWS_AS(opened->resize(new_size), Error);
    CHECK(opened->size() == old_size);
    CHECK((read_all(*opened) == model));
    CHECK_THROWS_AS(opened->write(bytes_of(512, 1), {0}), Error); // nobody knows where its tables are
}

TEST_CASE("resize: what it retires last is no leak, neither for a walk right after it nor when the image is closed") {
    // A bitmap's longer table, and nothing beyond the old size that would have to read as zeroes: the old table is all
    // that there is to do.
    ImagePlan plan;
    plan.virtual_size = 128 * 1024;
    plan.map(60, 60);
    plan.metadata_at = 1;
    plan.bitmaps = true;
    const auto disk = std::make_shared<FaultyDisk>(build_image(plan).bytes);
    auto opened = open_image(disk);
    opened->resize(16 * 1024 * 1024);
    opened->flush();
    if (GENERATE(true, false)) {
        MoveOwnership ownership;
        Gauges gauges;
        Compact compact(*opened, ownership, gauges, 7);
        (void)compact.plan({0}, opened->size(), 1000);
        compact.run({0}, 512, never);
        opened->flush();
        for (std::uint64_t k = 70; k < 150; ++k)
            opened->write(bytes_of(512, static_cast<unsigned>(k)), {k * 512});
        opened->flush();
        CHECK(judge(disk->bytes()).sound());
    }
    opened->close();
    INFO(judge(disk->bytes()).text());
    CHECK(judge(disk->bytes()).clean());
}
