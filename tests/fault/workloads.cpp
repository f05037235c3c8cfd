// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "tests/fault/workloads.h"

#include "lib/compact/compact.h"
#include "lib/compact/zero_scan.h"
#include "tests/fault/image_builder.h"

#include <numeric>
#include <thread>

namespace qlean::fault {

namespace {

const StopCheck go_on = [] { return false; };
constexpr std::size_t all = 1 << 20;

Run start(Bytes image, std::uint64_t seed) {
    Run run;
    run.disk = std::make_shared<FaultyDisk>(std::move(image));
    run.disk->record();
    run.image = open_image(run.disk);
    run.guest = std::make_unique<RecordedGuest>(*run.image, *run.disk, seed);
    return run;
}

/// The image of a guest that wrote everything in random order: nothing is where a compact image would have it.
ImagePlan scattered(unsigned cluster_bits, std::uint64_t virtual_size, std::uint64_t spread, std::uint64_t seed) {
    ImagePlan plan;
    plan.cluster_bits = cluster_bits;
    plan.virtual_size = virtual_size;
    std::mt19937_64 random(seed);
    std::vector<std::uint64_t> places(plan.guest_clusters() * spread);
    std::iota(places.begin(), places.end(), 4);
    std::shuffle(places.begin(), places.end(), random);
    for (std::uint64_t c = 0; c < plan.guest_clusters(); ++c)
        if (random() % 4 != 0)
            plan.data[c] = places[c];
        else if (random() % 4 == 0)
            plan.zero.push_back(c);
    return plan;
}

Run guest_only(std::uint64_t seed, std::uint64_t virtual_size, std::uint64_t cluster_size, int steps,
               const RecordedGuest::Mix &mix, unsigned version = 3) {
    Run run = start(empty_image(virtual_size, cluster_size, version), seed);
    for (int i = 0; i < steps; ++i) {
        run.guest->step(mix);
        if (run.guest->random()() % 32 == 0)
            run.image->give_back(); // what the engine does by itself every few seconds
    }
    return run;
}

Run small_clusters(std::uint64_t seed) { return guest_only(seed, 128 * 1024, 512, 150, {}); }
Run host_block_clusters(std::uint64_t seed) {
    RecordedGuest::Mix mix;
    mix.most = 40000;
    return guest_only(seed, 1024 * 1024, 4096, 100, mix, 2);
}
Run usual_clusters(std::uint64_t seed) {
    RecordedGuest::Mix mix;
    mix.most = 100000;
    return guest_only(seed, 1024 * 1024, 65536, 80, mix);
}
Run never_flushes(std::uint64_t seed) {
    RecordedGuest::Mix mix;
    mix.flush = 0;
    return guest_only(seed, 128 * 1024, 512, 200, mix);
}
Run trims_and_rewrites(std::uint64_t seed) {
    RecordedGuest::Mix mix{40, 40, 10, 10};
    mix.most = 16384;
    return guest_only(seed, 64 * 1024, 512, 200, mix);
}

/// Refcount blocks and, twice, the refcount table grow: 512-byte clusters, and an image that starts small.
Run growth(std::uint64_t seed) {
    Run run = start(empty_image(3 * 1024 * 1024, 512), seed);
    RecordedGuest::Mix mix{90, 0, 5, 5};
    mix.most = 4096;
    for (std::uint64_t at = 0; at < run.image->size(); at += 64 * 1024) {
        run.guest->write(at, 64 * 1024);
        if (run.guest->random()() % 4 == 0)
            run.guest->flush();
        if (run.guest->random()() % 4 == 0)
            run.guest->step(mix);
    }
    run.guest->flush();
    return run;
}

Run compaction(std::uint64_t seed) {
    Run run = start(build_image(scattered(9, 128 * 1024, 3, seed)).bytes, seed);
    const RecordedGuest::Mix mix;
    compact_all(*run.image, [&] { run.guest->step(mix); });
    run.guest->flush();
    return run;
}

Run compaction_host_blocks(std::uint64_t seed) {
    Run run = start(build_image(scattered(12, 512 * 1024, 2, seed)).bytes, seed);
    RecordedGuest::Mix mix;
    mix.most = 20000;
    compact_all(*run.image, [&] { run.guest->step(mix); });
    return run;
}

/// Metadata at the end of the file, most of the disk trimmed: L1, refcount table, blocks and L2 tables all move. The
/// L1 table is several clusters long.
Run metadata_moves(std::uint64_t seed) {
    ImagePlan plan;
    plan.virtual_size = 4 * 1024 * 1024; // an L1 table of 2 clusters
    std::mt19937_64 random(seed);
    for (std::uint64_t c = 0; c < plan.guest_clusters(); ++c)
        if (random() % 16 == 0 || c < 100)
            plan.data[c] = 1 + c / 4;
    std::uint64_t host = 20;
    for (auto &[guest, at] : plan.data)
        at = host += 1 + random() % 2;
    plan.metadata_at = host + 1500;
    plan.table_clusters = 1 + random() % 3;
    if (random() % 2)
        plan.leaked = {host + 1400, host + 1401};
    Run run = start(build_image(plan).bytes, seed);
    RecordedGuest::Mix mix{50, 20, 10, 20};
    mix.most = 3000;
    mix.end = 512 * 1024;
    run.guest->trim(64 * 1024, 128 * 1024);
    compact_all(*run.image, [&] {
        if (run.guest->random()() % 4 == 0)
            run.guest->step(mix);
    });
    run.guest->step(mix);
    run.guest->flush();
    return run;
}

Run zeroes(std::uint64_t seed) {
    Run run = start(empty_image(128 * 1024, 512), seed);
    RecordedGuest::Mix mix{60, 0, 30, 10};
    mix.most = 20000;
    for (int i = 0; i < 25; ++i)
        run.guest->step(mix);
    run.guest->zero(0, 50000, Image::Zero::keep_space);
    run.guest->zero(70000, 20000, Image::Zero::keep_space);
    zero_scan_all(*run.image, [&] { run.guest->step(mix); });
    run.guest->flush();
    return run;
}

/// The guest in a thread of its own beside compaction and zero scans. Not the same twice.
Run racing(std::uint64_t seed) {
    Run run = start(build_image(scattered(9, 128 * 1024, 3, seed)).bytes, seed);
    std::atomic<bool> done{false};
    std::thread guest([&] {
        const RecordedGuest::Mix mix{55, 20, 15, 10, 10};
        for (int i = 0; i < 400 && !done; ++i)
            run.guest->step(mix);
    });
    for (int pass = 0; pass < 3; ++pass) {
        compact_all(*run.image);
        zero_scan_all(*run.image);
    }
    done = true;
    guest.join();
    return run;
}

Run shutdown(std::uint64_t seed) {
    Run run = guest_only(seed, 128 * 1024, 512, 60, {});
    run.guest->trim(32 * 1024, 64 * 1024);
    run.image->close();
    return run;
}

} // namespace

void compact_all(Image &image, const std::function<void()> &between) {
    MoveOwnership ownership;
    Gauges gauges;
    Compact compact(image, ownership, gauges, 1);
    const std::uint64_t piece = image.geometry().bytes(16);
    for (int pass = 0; pass < 4; ++pass) {
        bool any = false;
        for (const auto &planned : compact.plan({0}, image.size(), all))
            for (std::uint64_t done = 0; planned.to_do && done < planned.length; done += piece) {
                compact.run(planned.at + done, std::min(piece, planned.length - done), go_on);
                any = true;
                if (between)
                    between();
            }
        compact.commit(go_on);
        if (between)
            between();
        if (!any && gauges.pending == 0)
            break;
    }
}

void zero_scan_all(Image &image, const std::function<void()> &between) {
    Gauges gauges;
    ZeroScan scan(image, gauges);
    const std::uint64_t piece = image.geometry().bytes(16);
    for (const auto &planned : scan.plan({0}, image.size(), all))
        for (std::uint64_t done = 0; planned.to_do && done < planned.length; done += piece) {
            scan.run(planned.at + done, std::min(piece, planned.length - done), go_on);
            if (between)
                between();
        }
    scan.commit(go_on);
}

const std::vector<Workload> &workloads() {
    static const std::vector<Workload> list = {
        {"guest, 512-byte clusters", 3, small_clusters},
        {"guest, 4 KiB clusters, version 2", 3, host_block_clusters},
        {"guest, 64 KiB clusters", 1, usual_clusters},
        {"guest that never flushes", 2, never_flushes},
        {"trims and rewrites", 3, trims_and_rewrites},
        {"growth of the refcount structures", 1, growth},
        {"compaction beside a guest", 4, compaction},
        {"compaction, 4 KiB clusters", 2, compaction_host_blocks},
        {"moves of metadata", 4, metadata_moves},
        {"zero scan beside a guest", 3, zeroes},
        {"threads racing", 4, racing},
        {"clean shutdown", 2, shutdown},
    };
    return list;
}

} // namespace qlean::fault
