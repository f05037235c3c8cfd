// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Deleting a snapshot ends when it is told to: what it leaves then is what a kill leaves.
#include "lib/compact/snapshot_delete.h"
#include "tests/fault/scene.h"

using namespace qlean;
using namespace qlean::fault;

namespace {

/// Some tables, all of them in a snapshot, every second one written to since.
Bytes with_a_snapshot() {
    ImagePlan plan;
    plan.virtual_size = 200 * 1024;
    plan.map_all(10);
    const auto disk = std::make_shared<FaultyDisk>(with_snapshot(build_image(plan).bytes, "a"));
    auto image = open_image(disk);
    for (std::uint64_t at = 5000; at < image->size() - 3000; at += 2 * 64 * image->geometry().cluster_size())
        image->write(bytes_of(3000, 7), {at});
    image->close();
    image.reset();
    return disk->bytes();
}

} // namespace

TEST_CASE("a deletion of a snapshot that is stopped leaves leaks at worst") {
    const Bytes before = with_a_snapshot();
    for (int stops_at = 0;; ++stops_at) {
        INFO("stopped at question " << stops_at);
        const auto disk = std::make_shared<FaultyDisk>(before);
        auto image = open_image(disk);
        const Bytes model = read_all(*image);
        int asked = 0;
        bool stopped = false;
        {
            MoveOwnership ownership;
            SnapshotDelete deletion(*image, ownership, 1, "a");
            try {
                deletion.run({0}, 1, [&] { return asked++ == stops_at; });
            } catch (const Error &error) {
                REQUIRE(error.kind() == Error::Kind::stopped);
                stopped = true;
            }
        }
        // Stopped while it compared refcounts it has not begun, and the snapshot is what it was.
        if (!image->state().snapshots.list().empty()) {
            CHECK(stopped);
            CHECK(snapshot_disks(disk->bytes()) == snapshot_disks(before));
        }
        CHECK(read_all(*image) == model);
        image->write(bytes_of(100, 9), {777}); // the guest goes on
        image->close();
        image.reset();
        const Verdict verdict = judge(disk->bytes());
        INFO(verdict.text());
        CHECK(verdict.sound());
        if (!stopped) {
            CHECK(verdict.leaks == 0);
            CHECK(stops_at > 8); // a question for each table, twice
            return;
        }
        image = open_image(disk);
        compact_all(*image);
        image->close();
        image.reset();
        CHECK(judge(disk->bytes()).clean());
    }
}
