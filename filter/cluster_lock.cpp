// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The striped cluster lock. Consecutive clusters fall on consecutive stripes, so a run is one or two spans of stripes
// and comes out sorted and free of duplicates without sorting anything.

#include "filter/cluster_lock.h"

#include <cassert>

namespace qlean {

namespace {

/// True while this thread holds clusters: entering twice is a bug that would show as a rare deadlock.
thread_local bool thread_holds_clusters = false;

} // namespace

void WriterPreferringLock::lock() {
    state_.fetch_add(one_waiting, std::memory_order_relaxed);
    for (;;) {
        std::uint32_t seen = state_.load(std::memory_order_relaxed);
        if ((seen & (writer_inside | reader_mask)) == 0) {
            if (state_.compare_exchange_weak(seen, (seen - one_waiting) | writer_inside, std::memory_order_acquire))
                return;
            continue;
        }
        state_.wait(seen, std::memory_order_relaxed);
    }
}

void WriterPreferringLock::unlock() {
    state_.fetch_sub(writer_inside, std::memory_order_release);
    state_.notify_all();
}

void WriterPreferringLock::lock_shared() {
    for (;;) {
        std::uint32_t seen = state_.load(std::memory_order_relaxed);
        if ((seen & (writer_inside | waiting_mask)) == 0) {
            if (state_.compare_exchange_weak(seen, seen + 1, std::memory_order_acquire))
                return;
            continue;
        }
        state_.wait(seen, std::memory_order_relaxed);
    }
}

void WriterPreferringLock::unlock_shared() {
    const std::uint32_t before = state_.fetch_sub(1, std::memory_order_release);
    if ((before & reader_mask) == 1 && (before & waiting_mask) != 0)
        state_.notify_all();
}

template <typename F>
void ClusterLocks::Hold::each_stripe(F f) {
    const auto span = [&](std::size_t first, std::size_t last) {
        for (std::size_t i = first; i <= last; i++)
            f(locks_.stripes_[i].lock);
    };
    if (run_.empty())
        return;
    if (run_.count() >= stripes) {
        span(0, stripes - 1);
        return;
    }
    const std::size_t first = run_.first % stripes, last = (run_.end - 1) % stripes;
    if (first <= last) {
        span(first, last);
    } else {
        span(0, last);
        span(first, stripes - 1);
    }
}

ClusterLocks::Hold::Hold(ClusterLocks &locks, ClusterRun run, Mode mode) : locks_(locks), run_(run), mode_(mode) {
    assert(!thread_holds_clusters);
    thread_holds_clusters = true;
    if (mode_ == Mode::shared)
        each_stripe([](WriterPreferringLock &l) { l.lock_shared(); });
    else
        each_stripe([](WriterPreferringLock &l) { l.lock(); });
}

ClusterLocks::Hold::~Hold() {
    if (mode_ == Mode::shared)
        each_stripe([](WriterPreferringLock &l) { l.unlock_shared(); });
    else
        each_stripe([](WriterPreferringLock &l) { l.unlock(); });
    thread_holds_clusters = false;
}

} // namespace qlean
