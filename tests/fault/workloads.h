// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// What images go through before their power is cut: guests with and without flushes, growth of the refcount
// structures, compaction and zero scans beside a guest, moves of metadata. All but the racing ones are the same for
// the same seed.
#pragma once

#include "tests/fault/recorded_guest.h"

namespace qlean::fault {

/// One recorded run. The image is gone; disk and guest remain to be judged.
struct Run {
    std::shared_ptr<FaultyDisk> disk;
    std::unique_ptr<Image> image;
    std::unique_ptr<RecordedGuest> guest;
};

struct Workload {
    const char *name;
    unsigned weight; ///< share of the states
    Run (*run)(std::uint64_t seed);
};
const std::vector<Workload> &workloads();

/// A pass of `compact` over the whole disk: plan, do in pieces, commit, until nothing is left to do. `between` is
/// called between the pieces.
void compact_all(Image &image, const std::function<void()> &between = {});
void zero_scan_all(Image &image, const std::function<void()> &between = {});

} // namespace qlean::fault
