// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "tests/fault/workloads.h"

#include "lib/compact/compact.h"
#include "lib/compact/snapshot_delete.h"
#include "lib/compact/zero_scan.h"
#include "tests/fault/image_builder.h"
#include "tests/fault/image_judge.h"
#include "tests/fault/workload_images.h"

#include <numeric>
#include <thread>

namespace qlean::fault {

namespace {

const StopCheck go_on = [] { return false; };
constexpr std::size_t all = 1 << 20;

void guest_only(Run &run, int steps, std::uint64_t most, RecordedGuest::Mix mix = {}) {
    mix.most = most;
    for (int i = 0; i < steps; ++i) {
        run.step(mix);
        if (run.random()() % 32 == 0)
            run.attempt([&] { run.image->give_back(); }); // what the engine does by itself every few seconds
    }
}

void small_clusters(Run &run) { guest_only(run, 150, 8192); }
void host_block_clusters(Run &run) { guest_only(run, 100, 40000); }
void usual_clusters(Run &run) { guest_only(run, 80, 100000); }
void never_flushes(Run &run) { guest_only(run, 200, 8192, {60, 15, 15, 0}); }
void trims_and_rewrites(Run &run) { guest_only(run, 200, 16384, {40, 40, 10, 10}); }

void growth(Run &run) {
    RecordedGuest::Mix mix{90, 0, 5, 5};
    mix.most = 4096;
    for (std::uint64_t at = 0; at < run.image->size(); at += 64 * 1024) {
        run.attempt([&] { run.guest->write(at, 64 * 1024); });
        if (run.random()() % 4 == 0)
            run.attempt([&] { run.guest->flush(); });
        if (run.random()() % 4 == 0)
            run.step(mix);
    }
    run.attempt([&] { run.guest->flush(); });
}

void compaction(Run &run) {
    RecordedGuest::Mix mix;
    mix.most = run.image->geometry().cluster_size() * 8;
    run.attempt([&] { compact_all(*run.image, [&] { run.step(mix); }); });
    run.attempt([&] { run.guest->flush(); });
}

void subclusters(Run &run) {
    RecordedGuest::Mix mix{45, 25, 20, 10};
    mix.most = 3000; // a subcluster has 512 bytes
    for (int i = 0; i < 40; ++i)
        run.step(mix);
    run.attempt([&] { compact_all(*run.image, [&] { run.step(mix); }); });
    mix.most = 40000;
    for (int i = 0; i < 20; ++i)
        run.step(mix);
    run.attempt([&] { zero_scan_all(*run.image, [&] { run.step(mix); }); });
    run.attempt([&] { run.guest->flush(); });
}

void metadata_moves(Run &run) {
    RecordedGuest::Mix mix{50, 20, 10, 20};
    mix.most = 3000;
    mix.end = 512 * 1024;
    run.attempt([&] { run.guest->trim(64 * 1024, 128 * 1024); });
    run.attempt([&] {
        compact_all(*run.image, [&] {
            if (run.random()() % 4 == 0)
                run.step(mix);
        });
    });
    run.step(mix);
    run.attempt([&] { run.guest->flush(); });
}

void zeroes(Run &run) {
    RecordedGuest::Mix mix{60, 0, 30, 10};
    mix.most = 20000;
    for (int i = 0; i < 25; ++i)
        run.step(mix);
    run.attempt([&] { run.guest->zero(0, 50000, Image::Zero::keep_space); });
    run.attempt([&] { run.guest->zero(70000, 20000, Image::Zero::keep_space); });
    run.attempt([&] { zero_scan_all(*run.image, [&] { run.step(mix); }); });
    run.attempt([&] { run.guest->flush(); });
}

void delete_snapshot(Image &image, const std::string &name) {
    MoveOwnership ownership;
    SnapshotDelete deletion(image, ownership, 1, name);
    deletion.run({0}, 1, go_on);
    deletion.commit(go_on);
}
void snapshots(Run &run) {
    RecordedGuest::Mix mix;
    mix.most = 4096;
    const auto rarely = [&] {
        if (run.random()() % 3 == 0)
            run.step(mix);
    };
    if (run.random()() % 2)
        run.attempt([&] { compact_all(*run.image, rarely); });
    if (run.random()() % 2)
        run.attempt([&] { zero_scan_all(*run.image, rarely); });
    run.attempt([&] { delete_snapshot(*run.image, run.random()() % 2 ? "a" : "b"); });
    run.attempt([&] { compact_all(*run.image, rarely); });
    run.attempt([&] { run.guest->flush(); });
}

void compressed(Run &run) {
    RecordedGuest::Mix mix{50, 20, 20, 10};
    mix.most = run.image->geometry().cluster_size() * 3;
    for (int i = 0; i < 15; ++i)
        run.step(mix);
    run.attempt([&] {
        compact_all(*run.image, [&] {
            if (run.random()() % 3 == 0)
                run.step(mix);
        });
    });
    for (int i = 0; i < 10; ++i)
        run.step(mix);
    run.attempt([&] { zero_scan_all(*run.image); });
    run.attempt([&] { compact_all(*run.image); });
    run.attempt([&] { run.guest->flush(); });
}

/// The guest in a thread of its own beside `maintenance`.
void beside_a_guest(Run &run, const std::function<void()> &maintenance) {
    std::atomic<bool> done{false};
    std::exception_ptr error;
    std::thread guest([&] {
        try {
            for (int i = 0; i < 400 && !done; ++i)
                run.guest->step({55, 20, 15, 10, 10});
        } catch (...) {
            error = std::current_exception();
        }
    });
    try {
        maintenance();
    } catch (...) {
        done = true;
        guest.join();
        throw;
    }
    done = true;
    guest.join();
    if (error)
        std::rethrow_exception(error);
}

void racing(Run &run) {
    beside_a_guest(run, [&] {
        for (int pass = 0; pass < 3; ++pass) {
            compact_all(*run.image);
            zero_scan_all(*run.image);
        }
    });
}

void racing_deletion(Run &run) {
    const std::uint64_t chance = run.guest->random()(); // before the guest's thread uses it
    beside_a_guest(run, [&] {
        if (chance & 1)
            compact_all(*run.image);
        delete_snapshot(*run.image, chance & 2 ? "a" : "b");
        compact_all(*run.image);
    });
}

void shutdown(Run &run) {
    guest_only(run, 60, 8192);
    run.attempt([&] { run.guest->trim(32 * 1024, 64 * 1024); });
    run.attempt([&] { run.image->close(); });
}

/// The bitmaps move and are stored; after a clean end without an error the enabled one is consistent.
void bitmaps(Run &run) {
    run.image->on_background_error([&run](const std::exception &e) { // what fails at the end is reported only
        if (const auto *error = dynamic_cast<const Error *>(&e))
            run.errors.push_back(*error);
    });
    RecordedGuest::Mix mix;
    mix.end = 64 * 1024;
    mix.most = 2048;
    const bool first = run.random()() % 2;
    if (first)
        run.step(mix);
    run.attempt([&] {
        compact_all(*run.image, [&] {
            if (run.random()() % 4 == 0)
                run.step(mix);
        });
    });
    run.step(mix);
    run.attempt([&] { run.image->close(); });
    if (run.errors.empty() && !has_consistent_bitmap(run.disk->bytes()))
        throw std::runtime_error("the bitmap is not consistent after a clean end");
}

/// Twice: so that the L1 table fits once, and has to move.
void resizes(Run &run) {
    RecordedGuest::Mix mix;
    mix.most = 4096;
    mix.end = run.image->size();
    run.step(mix);
    for (const std::uint64_t size : {120 * 1024, 3 * 1024 * 1024}) {
        run.attempt([&] { run.image->resize(size); });
        for (int i = 0; i < 6; ++i)
            run.step(mix);
    }
    run.attempt([&] { run.guest->flush(); });
    if (run.random()() % 2)
        run.attempt([&] { run.image->close(); });
}

} // namespace

void Run::attempt(const std::function<void()> &request) {
    if (!tolerant)
        return request();
    try {
        request();
    } catch (const Error &error) {
        errors.push_back(error);
    }
}

Run start(const Workload &workload, std::uint64_t seed) {
    Run run;
    run.original = workload.image(seed);
    run.snapshots = snapshot_disks(run.original);
    run.disk = std::make_shared<FaultyDisk>(run.original);
    run.disk->allow_share(seed % 2 == 1);
    run.disk->record();
    run.image = open_image(run.disk);
    run.guest = std::make_unique<RecordedGuest>(*run.image, *run.disk, seed);
    return run;
}

void compact_all(Image &image, const std::function<void()> &between) {
    MoveOwnership ownership;
    Gauges gauges;
    const std::uint64_t piece = image.geometry().bytes(16);
    Compact compact(image, ownership, gauges, 1, piece);
    for (int wide = 0; wide < 2; ++wide) { // as much as one request does; the rest piece by piece
        compact.run({0}, image.size(), go_on);
        if (between)
            between();
    }
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
        {"guest, 512-byte clusters", 3, true, empty_small, small_clusters},
        {"guest, 4 KiB clusters, version 2", 3, true, empty_host_blocks, host_block_clusters},
        {"guest, 64 KiB clusters", 1, true, empty_usual, usual_clusters},
        {"guest that never flushes", 2, true, empty_small, never_flushes},
        {"trims and rewrites", 3, true, empty_small, trims_and_rewrites},
        {"growth of the refcount structures", 1, true, empty_to_grow, growth},
        {"compaction beside a guest", 4, true, scattered_small, compaction},
        {"compaction, 4 KiB clusters", 2, true, scattered_host_blocks, compaction},
        {"moves of metadata", 4, true, metadata_at_the_end, metadata_moves},
        {"zero scan beside a guest", 3, true, empty_small, zeroes},
        {"threads racing", 4, false, scattered_small, racing},
        {"subclusters", 3, true, scattered_subclusters, subclusters},
        {"clean shutdown", 2, true, empty_small, shutdown},
        {"bitmaps", 4, true, with_bitmaps, bitmaps},
        {"snapshots", 4, true, with_snapshots, snapshots},
        {"snapshots, threads racing", 3, false, with_snapshots, racing},
        {"a snapshot deleted, threads racing", 3, false, with_snapshots, racing_deletion},
        // Not for the fault matrix, which knows disks of one size: rules (resize) has faults for it.
        {"resize", 3, false, to_be_resized, resizes},
        {"compressed clusters", 4, true, compressed_image, compressed},
        {"compressed clusters, threads racing", 3, false, compressed_image, racing},
        {"compressed clusters in snapshots", 4, true, compressed_with_snapshots, snapshots},
        {"compressed clusters in snapshots, threads racing", 3, false, compressed_with_snapshots, racing},
        {"a snapshot with compressed clusters deleted, threads racing", 3, false, compressed_with_snapshots,
         racing_deletion},
    };
    return list;
}

} // namespace qlean::fault
