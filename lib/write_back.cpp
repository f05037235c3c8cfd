// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "write_back.h"

#include "byte_order.h"
#include "error.h"

#include <algorithm>
#include <cassert>
#include <chrono>

namespace qlean {

/// What one commit copied at its start.
struct WriteBack::Round {
    std::vector<HostRun> retired;
    std::vector<L1Table::DirtyRun> l1;
    std::vector<L2Cache::Copy> l2;
    std::vector<PendingWords::Copy> words;
};

WriteBack::WriteBack(const Geometry &geometry, bool read_only, File &file, SyncLog &syncs, HeaderHome &header,
                     L1Table &l1, L2Cache &l2, Snapshots &snapshots, Refcounts &refcounts, Allocator &allocator)
    : geometry_(geometry), read_only_(read_only), file_(file), syncs_(syncs), header_(header), l1_(l1), l2_(l2),
      snapshots_(snapshots), refcounts_(refcounts), allocator_(allocator) {}

void WriteBack::require_healthy() const {
    if (poisoned())
        throw Error(
            Error::Kind::denied, EIO,
            fmt::format("'{}': an earlier write could not be made durable, so nothing more is written; stop the "
                        "server, check the host's storage, then start it again",
                        file_.name()));
}

void WriteBack::before_change() {
    if (read_only_)
        throw Error(Error::Kind::denied, EPERM, fmt::format("'{}' is served read-only", file_.name()));
    require_healthy();
    if (!changed())
        changed_.store(true, std::memory_order_relaxed);
    std::call_once(first_change_, [&] {
        if (autoclear_to_clear() == 0)
            return;
        lead([&] {
            header_.update([&](Header &h) { h.autoclear &= kept_up_; });
            sync();
        });
    });
}

bool WriteBack::anything_to_commit() const {
    return l1_.dirty() || l2_.dirty_bytes() != 0 || snapshots_.pending.any() || allocator_.retired_bytes() != 0;
}

void WriteBack::sync() {
    try {
        syncs_.sync();
    } catch (...) {
        poison();
        throw;
    }
}

void WriteBack::poison() {
    if (poisoned_.exchange(true))
        return;
    allocator_.poison();
    if (on_poison_)
        on_poison_();
}

void WriteBack::switch_as_leader(const std::function<void()> &switch_over) {
    try {
        switch_over();
    } catch (...) {
        poison();
        throw;
    }
    sync();
}

void WriteBack::sync_as_leader() { sync(); }

void WriteBack::write_refcounts_as_leader() {
    apply_increments();
    refcounts_.write_dirty();
}

// --- leading ------------------------------------------------------------------------------------------------------

void WriteBack::commit(Give give) {
    Lock guard(mutex_);
    // A task that waits for this one's turn need not any longer.
    const auto leave = [&]() WITH_LOCK(mutex_) {
        if (tasks_waiting_ > 0)
            led_.notify_all();
    };
    // A round that has started may have copied before this caller's writes returned: the next one counts.
    const std::uint64_t target = started_ + 1;
    for (;;) {
        if ((give == Give::back ? gave_back_ : succeeded_) >= target)
            return leave();
        if (completed_.load(std::memory_order_relaxed) >= target && failure_) {
            leave();
            std::rethrow_exception(failure_);
        }
        if (give == Give::back)
            give_back_next_ = true;
        if (leading_ || (tasks_waiting_ > 0 && !task_was_last_)) {
            ++commits_waiting_;
            guard.wait(led_);
            --commits_waiting_;
            continue;
        }
        leading_ = true;
        task_was_last_ = false;
        const std::uint64_t round = ++started_;
        const Give mode = std::exchange(give_back_next_, false) ? Give::back : Give::later;
        guard.unlock();
        std::exception_ptr failure;
        try {
            run(mode);
        } catch (...) {
            failure = std::current_exception();
        }
        guard.lock();
        leading_ = false;
        completed_.store(round, std::memory_order_relaxed);
        failure_ = failure;
        if (!failure) {
            succeeded_ = round;
            if (mode == Give::back)
                gave_back_ = round;
        }
        led_.notify_all();
    }
}

void WriteBack::lead(const std::function<void()> &task) {
    Lock guard(mutex_);
    // By turns: one task after the other would keep out a guest's flush, which wakes up too late each time, and one
    // round after the other a task.
    ++tasks_waiting_;
    while (leading_ || (commits_waiting_ > 0 && task_was_last_))
        guard.wait(led_);
    --tasks_waiting_;
    task_was_last_ = true;
    leading_ = true;
    guard.unlock();
    std::exception_ptr failure;
    try {
        task();
    } catch (...) {
        failure = std::current_exception();
    }
    guard.lock();
    leading_ = false;
    led_.notify_all();
    if (failure)
        std::rethrow_exception(failure);
}

void WriteBack::commit_as_leader(Give give) { run(give); }

// --- one round ----------------------------------------------------------------------------------------------------

void WriteBack::run(Give give) {
    require_healthy();
    const auto began = std::chrono::steady_clock::now();
    if (give == Give::back || anything_to_commit())
        link_ahead();

    Round round;
    round.retired = allocator_.take_retired();
    round.l1 = l1_.take_dirty();
    round.l2 = l2_.take_dirty();
    round.words = snapshots_.pending.take(); // after the slices: never older than they are
    try {
        write_first(round);
        // New tables are durable as a whole from here on, even if what makes them reachable fails: what is stored in
        // them next goes the way of every entry, after what it relies on.
        std::erase_if(round.l2, [&](const L2Cache::Copy &copy) {
            if (copy.whole_new_table)
                l2_.done(copy);
            return copy.whole_new_table;
        });
        publish(round);
    } catch (...) {
        l1_.put_back(round.l1);
        for (const auto &copy : round.l2)
            l2_.failed(copy);
        allocator_.put_back_retired(std::move(round.retired));
        throw;
    }
    for (const auto &copy : round.l2)
        l2_.done(copy);
    snapshots_.pending.done(round.words);
    unlinked_.insert(unlinked_.end(), round.retired.begin(), round.retired.end());
    if (give == Give::back && !unlinked_.empty()) {
        // Phase 3: lowered only now that nothing durable points there any more; free only when that is durable too.
        lower_unlinked();
        refcounts_.write_dirty();
        sync();
        settle_lowered();
    }
    last_ms_.store(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - began).count(),
                   std::memory_order_relaxed);
}

void WriteBack::apply_increments() {
    auto allocated = allocator_.take_allocated();
    std::size_t done = 0;
    try {
        for (; done < allocated.size(); ++done)
            refcounts_.increment(allocated[done]);
    } catch (...) {
        allocated.erase(allocated.begin(), allocated.begin() + static_cast<std::ptrdiff_t>(done));
        allocator_.put_back_allocated(allocated);
        throw;
    }
}

void WriteBack::lower_unlinked() {
    allocator_.load_regions_of(unlinked_);
    while (!unlinked_.empty()) {
        const HostRun run = unlinked_.back();
        // Of a cluster whose count is far too high, one after another: at once.
        const auto others = std::find_if(unlinked_.rbegin(), unlinked_.rend(), [&](HostRun r) { return r != run; });
        const auto times = static_cast<std::uint64_t>(others - unlinked_.rbegin());
        for (const HostRun &free : refcounts_.decrement(run, times))
            append_run(freed_, free);
        lowered_.insert(lowered_.end(), times, run);
        unlinked_.erase(others.base(), unlinked_.end());
    }
}

void WriteBack::settle_lowered() {
    allocator_.settle(lowered_, freed_);
    lowered_.clear();
    freed_.clear();
}

void WriteBack::write_table(const L2Cache::Copy &copy) {
    if (geometry_.cluster_of(copy.at).value == 0)
        throw std::logic_error("an L2 table without a home would overwrite the header");
    file_.write(std::as_bytes(std::span(copy.words)), copy.at);
}

/// Phase 1: all that the entries of phase 2 rely on. One sync covers it, and the guest's data with it.
void WriteBack::write_first(const Round &round) {
    apply_increments();
    // What an earlier round unlinked is lowered along the way; the sync that makes it durable has to happen anyway.
    lower_unlinked();
    refcounts_.write_dirty();
    for (const auto &copy : round.l2)
        if (copy.whole_new_table)
            write_table(copy);
    sync();
    settle_lowered();
}

/// Phase 2: the entries.
void WriteBack::publish(const Round &round) {
    bool wrote = false;
    for (const auto &copy : round.l2) {
        if (!syncs_.is_durable(copy.needs))
            throw std::logic_error("an L2 entry would be published before what it points to is durable");
        write_table(copy);
        wrote = true;
    }
    for (const auto &run : round.l1) {
        file_.write(std::as_bytes(std::span(run.words)), run.at);
        wrote = true;
    }
    wrote = snapshots_.pending.write(round.words) || wrote;
    if (wrote)
        sync();
}

} // namespace qlean
