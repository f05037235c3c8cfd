// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// What the tests of the rules share: an image on a faulty disk, a second actor, every power cut of what happened.
#pragma once

#include "lib/compact/compact.h"
#include "lib/compact/zero_scan.h"
#include "tests/catch.h"
#include "tests/fault/image_builder.h"
#include "tests/fault/image_judge.h"
#include "tests/fault/power_cut.h"
#include "tests/fault/workloads.h"

#include <future>

namespace qlean::fault {

/// An image being used, recorded from the start.
struct Scene {
    /// Settled: a first commit has linked refcount blocks ahead, as it does for any image that may grow.
    explicit Scene(Bytes bytes, std::uint64_t cache_bytes = 64 * 1024, bool settled = true);

    /// Ends the use without a shutdown, and tries every moment with every shape of power cut (each of a few changes,
    /// `ways` random ones of more). Empty, or what is wrong.
    std::string cut_everywhere(std::uint64_t seed, int ways = 6, std::size_t from = 0);

    std::shared_ptr<FaultyDisk> disk;
    std::unique_ptr<Image> image;
    std::unique_ptr<RecordedGuest> guest;
    MoveOwnership ownership;
    Gauges gauges;
};

/// Somebody wants more room than there is, and so the next commit links what comes behind the file. False if it is
/// there.
inline bool finds_no_room(Image &image) {
    return image.state().allocator.reserve(1 << 20, Allocator::Growth::now).empty();
}

/// Something that happens beside the test. Declare it before the Breakpoint that stops it, start it after.
class Beside {
  public:
    void start(std::function<void()> what) { done_ = std::async(std::launch::async, std::move(what)); }
    /// It has finished, within `patience`.
    bool finished(std::chrono::milliseconds patience = std::chrono::milliseconds(0)) {
        return done_.wait_for(patience) == std::future_status::ready;
    }
    /// Waits for it; throws what it threw.
    void join() { done_.get(); }

  private:
    std::future<void> done_;
};

/// Long enough for a thread that is not kept out to finish, on a busy machine.
constexpr std::chrono::milliseconds a_while{250};

Filter is(Op op);
/// Requests of this kind that touch host bytes [at, at + length).
Filter touches(Op op, std::uint64_t at, std::uint64_t length);

/// A seed for this test: of QLEAN_SEED, or a new one. To be shown with INFO.
std::uint64_t fresh_seed();

/// True if all bytes have this value.
bool all_are(const Bytes &bytes, unsigned value);

} // namespace qlean::fault
