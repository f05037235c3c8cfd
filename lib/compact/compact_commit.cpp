// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// What Compact does in FLUSH: everything that has no guest offset, metadata and what only snapshots have, moves in
// bounded steps; then the file is cut.
#include "compact.h"

#include "bitmap_moves.h"
#include "metadata_moves.h"
#include "snapshot_delete.h"

#include <chrono>
#include <shared_mutex>

namespace qlean {

namespace {

constexpr std::uint64_t step_bytes = 32 * 1024 * 1024;
/// Of a tail that no refcount block describes.
constexpr std::uint64_t min_uncounted_step_bytes = 4 * 1024 * 1024, max_uncounted_step_bytes = 256 * 1024 * 1024;
constexpr std::chrono::milliseconds quick_step{10}, slow_step{20};
constexpr int max_rounds = 8;
/// What is remembered of a walk over snapshots.
constexpr std::size_t max_snapshot_work = 65536;

} // namespace

/// What is free at the end, and what nobody has and no refcount block describes, such as a copy of a block device has.
void Compact::cut(const StopCheck &stop) {
    using Clock = std::chrono::steady_clock;
    Allocator &allocator = state_.allocator;
    std::uint64_t most = min_uncounted_step_bytes;
    const auto cut_uncounted = [&] {
        bool shorter = false;
        state_.write_back.lead([&] {
            const auto began = Clock::now();
            shorter = allocator.truncate_uncounted_step(most);
            // A guest's flush waits for a step: a hole of terabytes takes no time, and what the host holds does.
            const auto took = Clock::now() - began;
            if (took < quick_step)
                most = std::min(most * 2, max_uncounted_step_bytes);
            else if (took > slow_step)
                most = std::max(most / 2, min_uncounted_step_bytes);
        });
        return shorter;
    };
    const auto step = [&] {
        allocator.load_last_region(); // it may have got its block since the walk
        return allocator.truncate_step(step_bytes, HostCluster{0}) || (allocator.ends_uncounted() && cut_uncounted());
    };
    while (step())
        require_going(stop);
}

void Compact::commit(const StopCheck &stop) {
    state_.write_back.before_change();
    ownership_.claim(name_, connection_);
    prepare(stop);
    Uncommitted::Return returning(uncommitted_);
    const std::uint64_t end_before = state_.allocator.end();
    bool lacks_copied_flags = false;
    {
        const Lock guard(mutex_);
        retire_leaked(stop);
        lacks_copied_flags = lacks_copied_flags_;
    }
    if (lacks_copied_flags) {
        state_.write_back.commit(WriteBack::Give::back);
        set_copied_flags(state_, stop);
        const Lock guard(mutex_);
        lacks_copied_flags_ = false;
    }
    // One thing makes room for the next: what is dropped for what moves, what moved for the cut, the cut for what is
    // dropped then.
    for (int round = 0; round < max_rounds; ++round) {
        Layout before;
        {
            const Lock guard(mutex_);
            before = layout_;
        }
        const std::uint64_t end = state_.allocator.end();
        settle_on_full_disk(before, stop);
        const Lock guard(mutex_);
        measure();
        if (layout_.pending == 0 || (layout_.pending >= before.pending && state_.allocator.end() >= end && round > 0))
            break;
    }
    {
        const Lock guard(mutex_);
        packs_changed_ = snapshots_changed_ = true;
    }
    while (state_.allocator.punch_step(step_bytes))
        require_going(stop);
    gauges_.given_back_bytes += state_.geometry.bytes(end_before - std::min(end_before, state_.allocator.end()));
    returning.done();
}

/// settle_metadata() gives back by punching and cutting only when it has moved everything: for lack of space on the
/// host, what came free so far is given back first, and the rest tried once more.
void Compact::settle_on_full_disk(const Layout &layout, const StopCheck &stop) {
    try {
        return settle_metadata(layout, stop);
    } catch (const Error &error) {
        if (error.kind() != Error::Kind::no_space || state_.write_back.poisoned())
            throw;
    }
    image_.give_back();
    settle_metadata(layout, stop);
}

/// One round over what has no guest offset, in bounded steps, then the cut.
void Compact::settle_metadata(const Layout &layout, const StopCheck &stop) {
    std::set<std::uint64_t> empty;
    {
        const Lock guard(mutex_);
        empty = empty_tables_;
    }
    state_.write_back.commit(WriteBack::Give::back);
    require_going(stop);
    if (layout.pending > 0 || !empty.empty()) {
        struct EmbargoEnds {
            Allocator &allocator;
            ~EmbargoEnds() { allocator.embargo({}); }
        } const embargo_ends{state_.allocator};
        const auto give_back = [&] { image_.give_back(); };
        SnapshotWork work;
        if (state_.snapshots.any()) {
            work = take_snapshot_work();
            const std::uint64_t moved = move_snapshot_clusters(state_, work, layout.end, give_back, stop);
            has_moved_of_snapshots(moved, state_.geometry.bytes(moved));
            move_snapshot_extents(work, stop);
            state_.write_back.commit(WriteBack::Give::back);
        }
        const std::uint64_t wanted =
            std::max(adjacent_clusters_wanted(state_, layout), adjacent_clusters_of_snapshots(state_, layout.end));
        if (wanted != 0) {
            const auto repack = [&](GuestCluster c, std::uint64_t descriptor) {
                repacker_.move(c, descriptor, {layout.end, layout.end});
            };
            if (empty_window(state_, layout, wanted, repack, give_back))
                state_.write_back.commit(WriteBack::Give::back);
        }
        auto no_walk = keep_walks_out();
        std::uint64_t moved_of_snapshots = 0;
        state_.write_back.lead([&] {
            const std::uint64_t most = std::max<std::uint64_t>(step_bytes / state_.geometry.cluster_size(), 1);
            for (const std::uint64_t i : empty)
                drop_empty_table(state_, i);
            std::uint64_t moved = 0;
            for (std::uint64_t i = 0; i < state_.l1.size() && moved < most; ++i)
                moved += move_l2_table(state_, i, layout.end);
            for (const auto &[i, table] : work.tables)
                moved_of_snapshots += move_snapshot_l2_table(state_, i, table, layout.end);
            state_.write_back.commit_as_leader(WriteBack::Give::back);
            move_l1_table(state_, layout);
            move_snapshot_l1_tables(state_, layout.end, most);
            move_snapshot_table(state_, layout.end);
            move_refcount_table(state_, layout);
            move_bitmaps(state_, layout.end, most);
            move_refcount_blocks(state_, layout, most);
            state_.write_back.commit_as_leader(WriteBack::Give::back);
        });
        if (no_walk)
            no_walk.unlock();
        has_moved_of_snapshots(moved_of_snapshots, state_.geometry.bytes(moved_of_snapshots));
        const Lock guard(mutex_);
        for (const std::uint64_t i : empty)
            empty_tables_.erase(i);
    }
    // The tail goes without being punched first; what is free below it is punched. Blocks that describe nothing but
    // what was cut go then, and may have been the last thing at the end.
    cut(stop);
    state_.write_back.lead([&] {
        drop_refcount_blocks(state_, layout);
        if (state_.allocator.retired_bytes() != 0)
            state_.write_back.commit_as_leader(WriteBack::Give::back);
    });
    cut(stop);
}

// --- what only snapshots have -------------------------------------------------------------------------------------

/// Snapshots may have many tables, so they are walked between two passes, when the plan is read. With mutex_ held.
void Compact::look_at_snapshots(const StopCheck &stop) {
    const std::shared_lock guard(state_.snapshots.lock());
    const Wanted want = wanted_now();
    snapshot_work_ = find_snapshot_work(
        state_, want.end, [&](const Mapping &m) { return to_repack(m, want); }, max_snapshot_work, stop);
    snapshots_changed_ = false;
    measure();
}

/// A step of it: no more than may be uncommitted, for a guest's flush waits until the tables have moved.
SnapshotWork Compact::take_snapshot_work() {
    const Lock guard(mutex_);
    SnapshotWork work;
    const auto take = [most = std::max<std::uint64_t>(most_uncommitted(layout_.end) / state_.geometry.cluster_size(),
                                                      1)](auto &from) {
        const auto first = from.end() - static_cast<std::ptrdiff_t>(std::min<std::uint64_t>(most, from.size()));
        std::remove_reference_t<decltype(from)> taken(first, from.end());
        from.erase(first, from.end());
        return taken;
    };
    work.clusters = take(snapshot_work_.clusters);
    work.extents = take(snapshot_work_.extents);
    work.tables = take(snapshot_work_.tables);
    return work;
}

/// Extents that only snapshots have.
void Compact::move_snapshot_extents(const SnapshotWork &work, const StopCheck &stop) {
    const Wanted want = wanted(stop);
    for (std::size_t i = 0; i < work.extents.size(); ++i) {
        require_going(stop);
        const auto &[c, descriptor] = work.extents[i];
        const auto outcome = move_extent(c, descriptor, want);
        if (outcome == Repacker::Outcome::moved)
            has_moved_of_snapshots(1, entry::compressed_extent(descriptor, state_.geometry.cluster_bits()).bytes);
        if (outcome == Repacker::Outcome::no_room)
            return found_no_room(std::span(work.extents).subspan(i));
    }
}

/// So many of what was found have moved.
void Compact::has_moved_of_snapshots(std::uint64_t count, std::uint64_t bytes) {
    gauges_.moved_bytes += bytes;
    const Lock guard(mutex_);
    snapshot_work_.pending -= std::min(snapshot_work_.pending, count);
}

/// A walk that reads snapshots' tables from the file would not find them where it saw them.
std::unique_lock<RwLock> Compact::keep_walks_out() {
    return state_.snapshots.any() ? std::unique_lock(state_.snapshots.lock()) : std::unique_lock<RwLock>();
}

} // namespace qlean
