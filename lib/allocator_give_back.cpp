// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The second half of a cluster's life: retired, settled, punched, cut off.
#include "allocator.h"

#include "error.h"

namespace qlean {

void Allocator::add_references(HostRun run, std::uint64_t times) {
    const Lock guard(mutex_);
    for (std::uint64_t i = 0; i < times; ++i)
        append_run(allocated_runs_, run);
    note(run);
}

void Allocator::touch(const std::vector<HostRun> &runs) {
    const Lock guard(mutex_);
    for (const HostRun &run : runs)
        note(run);
}

void Allocator::retire(const std::vector<HostRun> &runs) {
    if (runs.empty())
        return;
    const Lock guard(mutex_);
    for (const HostRun &run : runs) {
        append_run(retired_runs_, run);
        note(run);
        retired_.fetch_add(run.count, std::memory_order_relaxed);
    }
}

std::vector<HostRun> Allocator::take_retired() {
    const Lock guard(mutex_);
    return std::exchange(retired_runs_, {});
}

void Allocator::put_back_retired(std::vector<HostRun> runs) {
    const Lock guard(mutex_);
    retired_runs_.insert(retired_runs_.end(), runs.begin(), runs.end());
}

std::vector<HostRun> Allocator::take_allocated() {
    const Lock guard(mutex_);
    return std::exchange(allocated_runs_, {});
}

void Allocator::put_back_allocated(const std::vector<HostRun> &runs) {
    const Lock guard(mutex_);
    allocated_runs_.insert(allocated_runs_.begin(), runs.begin(), runs.end());
}

void Allocator::settle(const std::vector<HostRun> &runs, const std::vector<HostRun> &freed) {
    const Lock guard(mutex_);
    retired_.fetch_sub(cluster_count(runs), std::memory_order_relaxed);
    for (const HostRun &run : freed) {
        for (std::uint64_t i = 0; i < run.count; ++i)
            add_free((run.first + i).value, false);
        punch_queue_.push_back(run);
        queued_ += run.count;
    }
}

/// Where all is free between two runs, the two become one, which takes one call; unless it gets longer than `most`
/// clusters, or what lies between more than that in all.
void Allocator::bridge(std::vector<HostRun> &withdrawn, std::uint64_t most) {
    std::uint64_t left = most;
    std::vector<HostRun> joined;
    for (const HostRun &run : withdrawn) {
        if (!joined.empty()) {
            const std::uint64_t from = joined.back().end().value, to = run.first.value;
            std::uint64_t c = from;
            while (c < to && to - from <= left && run.end() - joined.back().first <= most && free_.get(c))
                ++c;
            if (c == to) {
                for (c = from; c < to; ++c)
                    free_.clear(c);
                free_count_ -= to - from;
                punching_ += to - from;
                append_run(joined, {{from}, to - from});
                left -= to - from;
            }
        }
        append_run(joined, run);
    }
    withdrawn.swap(joined);
}

bool Allocator::punch_step(std::uint64_t max_bytes) {
    std::vector<HostRun> withdrawn;
    {
        const Lock guard(mutex_);
        if (poisoned_.load(std::memory_order_acquire) || punch_queue_.empty())
            return false;
        const std::uint64_t most = std::max<std::uint64_t>(max_bytes / geometry_.cluster_size(), 1);
        std::uint64_t budget = most;
        while (budget > 0 && !punch_queue_.empty()) {
            HostRun &front = punch_queue_.front();
            const std::uint64_t n = std::min(front.count, budget);
            for (std::uint64_t i = 0; i < n; ++i) {
                const std::uint64_t c = (front.first + i).value;
                // Reused, truncated away or punched already: nothing to do for it.
                if (c >= end_ || !free_.get(c) || zero_.get(c))
                    continue;
                free_.clear(c);
                --free_count_;
                ++punching_;
                append_run(withdrawn, {{c}, 1});
            }
            budget -= n;
            queued_ -= n;
            front.first += n;
            front.count -= n;
            if (front.count == 0)
                punch_queue_.pop_front();
        }
        coalesce(withdrawn);
        bridge(withdrawn, most);
    }
    std::vector<bool> punched(withdrawn.size());
    std::exception_ptr error;
    for (std::size_t i = 0; i < withdrawn.size(); ++i) {
        try {
            if (!error)
                punched[i] = file_.punch(geometry_.offset_of(withdrawn[i].first), geometry_.bytes(withdrawn[i].count));
        } catch (...) {
            error = std::current_exception();
        }
    }
    {
        const Lock guard(mutex_);
        for (std::size_t i = 0; i < withdrawn.size(); ++i)
            for (std::uint64_t n = 0; n < withdrawn[i].count; ++n) {
                --punching_;
                add_free((withdrawn[i].first + n).value, punched[i]);
            }
    }
    if (error)
        std::rethrow_exception(error);
    return true;
}

bool Allocator::truncate_step(std::uint64_t max_bytes, HostCluster floor) {
    const Lock length_guard(length_mutex_);
    std::uint64_t new_end;
    const std::uint64_t old_end = end();
    {
        const Lock guard(mutex_);
        if (poisoned_.load(std::memory_order_acquire))
            return false;
        const std::uint64_t lowest_end = std::max(
            floor.value, end() - std::min(end(), std::max<std::uint64_t>(max_bytes / geometry_.cluster_size(), 1)));
        new_end = end_;
        while (new_end > lowest_end && free_.get(new_end - 1)) {
            --new_end;
            free_.clear(new_end);
            zero_.clear(new_end);
            --free_count_;
        }
        if (new_end == end_)
            return false;
        // Withdrawn: nobody is given a cluster at or beyond new_end until the file has been extended again, and
        // extending waits for length_mutex_.
        resize_maps(new_end);
    }
    try {
        file_.truncate(geometry_.bytes(new_end));
    } catch (...) {
        // The file is as long as it was: what was withdrawn comes back, holding whatever it holds.
        const Lock guard(mutex_);
        resize_maps(old_end);
        for (std::uint64_t r = new_end / refcounts_.region_clusters(); r < loaded_.size(); ++r)
            loaded_[r] = true;
        for (std::uint64_t c = new_end; c < old_end; ++c)
            add_free(c, false);
        throw;
    }
    return true;
}

bool Allocator::truncate_uncounted_step(std::uint64_t max_bytes) {
    const Lock length_guard(length_mutex_);
    if (poisoned_.load(std::memory_order_acquire) || !ends_uncounted())
        return false;
    const std::uint64_t most = std::max<std::uint64_t>(max_bytes / geometry_.cluster_size(), 1);
    const std::uint64_t lowest_end = end() - std::min(end(), most);
    std::uint64_t new_end = end();
    while (new_end > lowest_end && !refcounts_.linked((new_end - 1) / refcounts_.region_clusters()))
        new_end = std::max(round_down(new_end - 1, refcounts_.region_clusters()), lowest_end);
    file_.truncate(geometry_.bytes(new_end));
    const Lock guard(mutex_);
    resize_maps(new_end); // nothing there was free
    return true;
}

} // namespace qlean
