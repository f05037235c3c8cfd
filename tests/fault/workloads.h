// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// What images go through before their power is cut: guests with and without flushes, growth of the refcount
// structures, compaction and zero scans beside a guest, moves of metadata. All but the racing ones are the same for
// the same seed.
#pragma once

#include "lib/error.h"
#include "tests/fault/image_judge.h"
#include "tests/fault/recorded_guest.h"

namespace qlean::fault {

/// One recorded run.
struct Run {
    std::shared_ptr<FaultyDisk> disk;
    std::unique_ptr<Image> image;
    std::unique_ptr<RecordedGuest> guest;
    Bytes original;          ///< the image as it was
    SnapshotDisks snapshots; ///< its snapshots
    /// Errors are noted instead of thrown, and the run goes on.
    bool tolerant = false;
    std::vector<Error> errors;

    /// Does one request, or one operation.
    void attempt(const std::function<void()> &request);
    void step(const RecordedGuest::Mix &mix) {
        attempt([&] { guest->step(mix); });
    }
    std::mt19937_64 &random() { return guest->random(); }
};

struct Workload {
    const char *name;
    unsigned weight; ///< share of the states
    bool repeatable; ///< the same for the same seed
    Bytes (*image)(std::uint64_t seed);
    void (*go)(Run &run);
};
const std::vector<Workload> &workloads();

/// Opens the workload's image on a disk that records.
Run start(const Workload &workload, std::uint64_t seed);

/// A pass of `compact` over the whole disk: plan, do in pieces, commit, until nothing is left to do. `between` is
/// called between the pieces.
void compact_all(Image &image, const std::function<void()> &between = {});
void zero_scan_all(Image &image, const std::function<void()> &between = {});

} // namespace qlean::fault
