// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "snapshot_delete.h"

#include "../adjacent.h"
#include "../byte_order.h"
#include "snapshot_moves.h"

namespace qlean {

namespace {

constexpr std::uint64_t entries_at_a_time = 4096;
/// References retired between commits: bounds memory.
constexpr std::size_t max_runs = 1 << 20;
constexpr std::uint64_t max_dirty_bytes = 8 * 1024 * 1024;

} // namespace

SnapshotDelete::SnapshotDelete(Image &image, MoveOwnership &ownership, std::uint64_t connection,
                               const std::string &name_or_id)
    : image_(image), state_(image.state()), ownership_(ownership), connection_(connection),
      snapshot_(state_.snapshots.find(name_or_id)) {
    if (!snapshot_)
        throw Error(Error::Kind::denied, EPERM,
                    fmt::format("'{}' has no snapshot '{}'", state_.file.name(), name_or_id));
}

SnapshotDelete::~SnapshotDelete() { ownership_.release(connection_); }

std::vector<Maintenance::Planned> SnapshotDelete::plan(GuestOffset at, std::uint64_t length, std::size_t,
                                                       const StopCheck &) {
    return {{at, length, !deleted_}};
}

void SnapshotDelete::run(GuestOffset, std::uint64_t, const StopCheck &stop) {
    const std::lock_guard guard(mutex_);
    if (deleted_)
        return;
    state_.write_back.before_change();
    // Nothing moves meanwhile, and no other snapshot goes.
    ownership_.claim(name_, connection_);
    const auto all = state_.snapshots.list();
    if (std::find(all.begin(), all.end(), snapshot_) == all.end()) { // over another connection
        deleted_ = true;
        return;
    }
    if (!state_.snapshots.close_for_use(snapshot_))
        throw Error(Error::Kind::busy, EPERM,
                    fmt::format("snapshot '{}' is being read over its export; disconnect whoever reads it first",
                                snapshot_->entry().name));
    std::unique_lock<RwLock> no_walk;
    try {
        verify(stop);
        no_walk = std::unique_lock(state_.snapshots.lock());
        remove_from_table();
    } catch (...) {
        state_.snapshots.reopen_for_use(snapshot_);
        throw;
    }
    deleted_ = true;
    // The snapshot is gone. If this stops early, what is left to do is what a crash leaves: leaks, and flags that lack.
    retire_references(stop);
    set_copied_flags(state_, stop);
    if (state_.snapshots.list().empty())
        state_.snapshots.none_left();
}

void SnapshotDelete::commit(const StopCheck &) { image_.give_back(); }

/// A count that is too low would make free what somebody else still has. The walk takes the snapshots' lock itself.
void SnapshotDelete::verify(const StopCheck &stop) {
    const Allocator::Watch watch(state_.allocator);
    verify_image(state_, watch, stop);
}

/// Durable when it returns. A full disk is a reason to delete a snapshot: the new table finds room where something was
/// given up before.
void SnapshotDelete::remove_from_table() {
    try {
        return switch_table();
    } catch (const Error &error) {
        if (error.kind() != Error::Kind::no_space || state_.write_back.poisoned())
            throw;
    }
    image_.give_back();
    switch_table();
}

void SnapshotDelete::switch_table() {
    const Geometry &g = state_.geometry;
    const std::uint64_t clusters = g.clusters_for(state_.snapshots.table_without(snapshot_.get()).encode().size());
    state_.write_back.lead([&] {
        // Words of tables that are going must not be written when they are gone.
        state_.write_back.commit_as_leader(WriteBack::Give::back);
        auto room = clusters == 0 ? Allocator::Reservation{} : reserve_adjacent(state_, clusters);
        store_snapshot_table(state_, std::move(room), snapshot_.get());
    });
}

/// Nobody changes a table that the snapshot has: the active image copies one that is shared before it does. So all of
/// them can be read at leisure, each before its own reference goes.
void SnapshotDelete::retire_references(const StopCheck &stop) {
    const Geometry &g = state_.geometry;
    std::vector<HostRun> runs;
    const auto retire = [&] {
        state_.allocator.retire(std::exchange(runs, {}));
        state_.write_back.commit(WriteBack::Give::back);
    };
    std::vector<Mapping> mappings;
    for (std::uint64_t i = 0; i < snapshot_->l1_size(); ++i) {
        const HostOffset table = snapshot_->table(i);
        if (table.value == 0)
            continue;
        require_going(stop);
        const std::uint64_t first = i * g.l2_entries(), end = first + g.l2_entries();
        for (std::uint64_t at = first; at < end; at += mappings.size()) {
            mappings.resize(std::min(entries_at_a_time, end - at));
            state_.mapper.survey(*snapshot_, {at}, mappings);
            for (const Mapping &m : mappings)
                state_.mapper.append_references(runs, m);
        }
        append_run(runs, {g.cluster_of(table), 1});
        if (runs.size() > max_runs)
            retire();
    }
    append_run(runs, snapshot_->l1_run(g));
    retire();
}

namespace {

using Owned = std::pair<GuestCluster, HostCluster>; ///< an entry, and what it alone refers to

/// Of entries in a table that the cache has slices of.
void set_flags(State &state, const std::vector<Owned> &owned) {
    for (const auto &[c, host] : owned) {
        const RangeLock::Exclusive guard(state.ranges, state.geometry.offset_of(c), 1);
        Mapper::Editor editor(state.mapper, c, 1);
        const Mapping m = editor.peek(c);
        if (!m.has_host() || m.copied || m.host != host)
            continue;
        L2Words words = editor.words(c);
        words.entry |= entry::copied;
        editor.set_words(c, words);
    }
}

/// Of entries so far beyond the end of the disk (the VM state that QEMU's loadvm leaves there) that no slice has them.
/// Nobody else changes these, and as the leader nobody moves their table.
void set_flags_beyond(State &state, const std::vector<Owned> &owned) {
    if (owned.empty())
        return;
    const Geometry &g = state.geometry;
    state.write_back.lead([&] {
        state.write_back.write_refcounts_as_leader();
        state.write_back.sync_as_leader(); // a flag never before the count that it speaks of
        for (const Owned &entry_of : owned) {
            const GuestCluster c = entry_of.first;
            const HostOffset at = state.l1.table(g.l1_index(c)) + g.l2_index(c) * g.entry_words() * 8;
            std::uint64_t word = 0;
            const std::span bytes = std::as_writable_bytes(std::span(&word, 1));
            state.file.read(bytes, at);
            word |= big_endian(entry::copied);
            state.file.write(bytes, at);
        }
    });
}

} // namespace

void set_copied_flags(State &state, const StopCheck &stop) {
    const Geometry &g = state.geometry;
    const std::uint64_t cached_slices = L2Cache::slice_count(g);
    std::vector<Mapping> mappings;
    std::vector<Owned> candidates, ours, beyond;
    for (std::uint64_t i = 0; i < state.l1.size(); ++i) {
        const std::uint64_t word = state.l1.word(i);
        if (word == 0)
            continue;
        require_going(stop);
        candidates.clear();
        const std::uint64_t first = i * g.l2_entries();
        const std::uint64_t end = first + g.l2_entries();
        for (std::uint64_t at = first; at < end; at += mappings.size()) {
            mappings.resize(std::min(entries_at_a_time, end - at));
            state.mapper.survey({at}, mappings);
            for (std::size_t n = 0; n < mappings.size(); ++n)
                if (mappings[n].has_host() && !mappings[n].copied)
                    candidates.emplace_back(GuestCluster{at + n}, mappings[n].host);
        }
        if (candidates.empty() && (word & entry::copied))
            continue;
        // The count of what an entry refers to only falls, so what is one now stays one as long as the entry is the
        // same.
        ours.clear();
        beyond.clear();
        bool own_table = word & entry::copied;
        state.write_back.lead([&] {
            // Whatever an entry has been seen to refer to by now has all its counts.
            state.write_back.write_refcounts_as_leader();
            if (!own_table)
                own_table = state.refcounts.get(g.cluster_of(entry::table(word))) == 1;
            for (const auto &candidate : candidates)
                if (own_table && state.refcounts.get(candidate.second) == 1)
                    (state.l2.slice_of(candidate.first) < cached_slices ? ours : beyond).push_back(candidate);
        });
        if (!own_table)
            continue; // shared, and so is all that it refers to
        if ((word & entry::copied) == 0) {
            const std::lock_guard guard(state.l1.lock(i));
            if (state.l1.word(i) != word)
                continue; // it is the guest's own by now
            state.l1.set_copied(i);
        }
        set_flags(state, ours);
        set_flags_beyond(state, beyond);
        if (state.l2.dirty_bytes() > max_dirty_bytes)
            state.write_back.commit(WriteBack::Give::later);
    }
    state.write_back.commit(WriteBack::Give::back);
}

} // namespace qlean
