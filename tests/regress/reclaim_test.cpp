// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// What users met who wanted their space back with other tools: UTM's "Reclaim Space", oVirt.
#include "tests/regress/rig.h"

#include <mutex>

using namespace qlean;
using namespace qlean::fault;

namespace {

constexpr std::uint64_t cluster = 4096;

/// Most of the file is in use, in random order, and a tenth of it can go.
ImagePlan used(std::uint64_t seed) {
    ImagePlan plan;
    plan.cluster_bits = 12;
    plan.virtual_size = 2048 * cluster;
    plan.metadata_at = 4;
    std::vector<std::uint64_t> places(2200);
    for (std::uint64_t i = 0; i < places.size(); ++i)
        places[i] = 20 + i;
    std::mt19937_64 random(seed);
    std::shuffle(places.begin(), places.end(), random);
    for (std::uint64_t c = 0; c < 2000; ++c)
        plan.data[c] = places[c];
    return plan;
}

} // namespace

TEST_CASE("UTM#4377: reclaiming needs next to no additional space on the way, and the file never gets longer") {
    Rig rig(build_image(used(4377)).bytes);
    FaultyFile file(rig.disk);
    const std::uint64_t allocated = file.allocated(), length = rig.disk->length();
    std::uint64_t most = 0, longest = 0;
    std::mutex measuring; // space is given back beside the moves
    const int hook = rig.disk->add_hook(false, [&](const Request &) {
        const std::lock_guard guard(measuring);
        most = std::max(most, FaultyFile(rig.disk).allocated());
        longest = std::max(longest, rig.disk->length());
    });
    CHECK(rig.compact() > 0);
    rig.trim(200 * cluster, 700 * cluster);
    CHECK(rig.compact() > 0);
    rig.disk->remove_hook(hook);
    {
        const std::lock_guard guard(measuring);
        CHECK(longest <= length);
        CHECK(most <= allocated + 1024 * 1024); // what may be moved and not committed, of 8 MiB
    }
    CHECK(file.allocated() < allocated / 3 * 2);
    CHECK(rig.disk->length() < length / 3 * 2);
    rig.finish();
}

TEST_CASE("UTM#4377: a refcount block that lies in its own region does not keep the file long") {
    ImagePlan plan;
    plan.cluster_bits = 12;
    plan.virtual_size = 512 * cluster;
    plan.map(100, 1900);
    plan.metadata_at = 2200; // beyond the first 2048 clusters, so that two blocks are needed, and the second says so
    const BuiltImage built = build_image(plan);
    REQUIRE(built.refcount_blocks.size() == 2);
    Rig rig(built.bytes);
    CHECK(rig.compact() > 0);
    CHECK(rig.disk->length() <= 110 * cluster);
    rig.finish();
}

TEST_CASE("UTM#6547: reclaiming again and again, with crashes in between, leaves the guest's disk as it was") {
    const std::uint64_t seed = fresh_seed();
    INFO("QLEAN_SEED=" << seed);
    std::mt19937_64 random(seed);
    ImagePlan plan = used(seed);
    plan.virtual_size = 512 * cluster;
    std::erase_if(plan.data, [](const auto &entry) { return entry.first >= 512; });
    Rig rig(build_image(plan).bytes);
    PunchGuard guard(rig.disk);
    for (int round = 0; round < 6; ++round) {
        // What "Reclaim Space" is used after: much was deleted, and free space was overwritten with zeroes.
        rig.trim(random() % 400 * cluster, 60 * cluster);
        rig.write(random() % 400 * cluster, 50 * cluster, 0);
        rig.image->flush();
        const std::uint64_t crash_at = random() % 40;
        std::uint64_t steps = 0;
        struct Crash {};
        try {
            zero_scan_all(*rig.image);
            CHECK(rig.reads_right());
            const int passes = rig.compact([&] {
                if (++steps == crash_at)
                    throw Crash{};
            });
            CHECK(passes > 0);
        } catch (const Crash &) {
            const Verdict verdict = judge(rig.disk->bytes());
            INFO(verdict.text());
            CHECK(verdict.sound());
        }
        rig.crash_and_reopen();
        CHECK(rig.reads_right());
        rig.write(random() % 400 * cluster + 5, 30 * cluster, 1 + random() % 255);
        rig.image->flush();
    }
    CHECK(rig.compact() > 0);
    CHECK(guard.text() == "");
    rig.finish();
}

TEST_CASE("oVirt/vdsm#371: leaked clusters are found and given back while the guest runs") {
    ImagePlan plan;
    plan.cluster_bits = 12;
    plan.virtual_size = 256 * cluster;
    for (std::uint64_t c = 0; c < 100; ++c)
        plan.data[c] = 10 + c * 2;
    for (std::uint64_t c = 0; c < 60; ++c)
        plan.leaked.push_back(11 + c * 2); // between the data
    for (std::uint64_t c = 400; c < 480; ++c)
        plan.leaked.push_back(c); // and at the end of the file
    plan.metadata_at = 300;
    Rig rig(build_image(plan).bytes);
    CHECK(judge(rig.disk->bytes()).leaks == 140);
    unsigned value = 0;
    rig.compact([&] {
        // The guest goes on, and may be given what was leaked as soon as it has been given back.
        rig.write((120 + value % 100) * cluster + 3, 5 * cluster, 1 + value);
        rig.write(value % 90 * cluster, 2 * cluster, 2 + value);
        rig.trim((120 + value % 50) * cluster, 2 * cluster);
        ++value;
    });
    CHECK(value > 3);
    CHECK(rig.compact() > 0);
    CHECK(rig.reads_right());
    rig.image->give_back();
    const Verdict verdict = judge(rig.disk->bytes()); // in a running server, not only after its shutdown
    INFO(verdict.text());
    CHECK(verdict.clean());
    CHECK(rig.disk->length() < 260 * cluster);
    rig.finish();
}
