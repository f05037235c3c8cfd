// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "range_lock.h"

namespace qlean {

RangeLock::RangeLock(const Geometry &geometry)
    : unit_bits_(std::max(geometry.cluster_bits(), 16u)), stripes_(std::make_unique<RwLock[]>(stripe_count)) {}

void RangeLock::drain() {
    for (std::uint64_t i = 0; i < stripe_count; ++i) {
        stripes_[i].lock();
        stripes_[i].unlock();
    }
}

RangeLock::Stripes RangeLock::stripes(GuestOffset at, std::uint64_t length) const {
    const std::uint64_t first = at.value >> unit_bits_;
    const std::uint64_t last = (at.value + length - 1) >> unit_bits_;
    if (last - first + 1 >= stripe_count)
        return {0, 0, stripe_count};
    const std::uint64_t a = first % stripe_count, b = last % stripe_count;
    if (a <= b)
        return {0, a, b + 1};
    return {b + 1, a, stripe_count};
}

bool RangeLock::try_lock(const Stripes &stripes) {
    std::uint64_t taken = 0;
    bool all = true;
    stripes.each([&](std::uint64_t i) {
        if (all && stripes_[i].try_lock())
            ++taken;
        else
            all = false;
    });
    if (all)
        return true;
    std::uint64_t undone = 0;
    stripes.each([&](std::uint64_t i) {
        if (undone < taken) {
            stripes_[i].unlock();
            ++undone;
        }
    });
    return false;
}

} // namespace qlean
