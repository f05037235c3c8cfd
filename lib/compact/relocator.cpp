// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "relocator.h"

#include "../error.h"
#include "../subcluster_change.h"
#include "zero_bytes.h"

#include <shared_mutex>

namespace qlean {

namespace {

/// Writes a cluster; where the destination reads as zeroes already, holes stay holes.
void write_cluster(File &file, std::span<const std::byte> bytes, HostOffset at, bool destination_is_zero) {
    if (!destination_is_zero)
        return file.write(bytes, at);
    std::size_t begin = 0;
    while (begin < bytes.size()) {
        const auto block = [&](std::size_t from) {
            return bytes.subspan(from, std::min(host_block, bytes.size() - from));
        };
        if (all_zero(block(begin))) {
            begin += host_block;
            continue;
        }
        std::size_t end = begin;
        while (end < bytes.size() && !all_zero(block(end)))
            end += host_block;
        end = std::min(end, bytes.size());
        file.write(bytes.subspan(begin, end - begin), at + begin);
        begin = end;
    }
}

/// What of a cluster is in its host cluster.
std::vector<subclusters::Piece> pieces_with_data(const Geometry &g, const Mapping &mapping) {
    std::vector<subclusters::Piece> pieces;
    subclusters::each_piece(g, mapping, 0, g.cluster_size(), [&](const Mapping &m, std::uint64_t at, std::uint64_t n) {
        if (m.kind == Mapping::Kind::data)
            pieces.push_back({at, n});
    });
    return pieces;
}

/// What refers to `source` at guest cluster `c`: the active image, and snapshots.
struct Referrers {
    bool active = false;
    std::vector<SnapshotPointer> snapshots;

    std::uint64_t count() const { return snapshots.size() + active; }
};

L2Words read_entry(State &state, HostOffset at) {
    std::uint64_t words[2] = {0, 0};
    state.snapshots.pending.read(at, std::span(words).first(state.geometry.entry_words()));
    return {words[0], words[1]};
}

HostOffset entry_home(const Geometry &g, HostOffset table, GuestCluster c) {
    return table + g.l2_index(c) * g.entry_words() * 8;
}

/// With `c` in the range lock. Nothing if the active image has the cluster where its entries do not change.
std::optional<Referrers> find_referrers(State &state, GuestCluster c, HostCluster source) {
    const Geometry &g = state.geometry;
    const auto refers = [&](const Mapping &m) { return m.has_host() && m.host == source; };
    Referrers found;
    Mapping m;
    if (c.value < g.guest_clusters()) {
        state.mapper.resolve(c, std::span(&m, 1));
        found.active = refers(m);
    } else if (g.l1_index(c) < state.l1.size() && state.mapper.has_table(c)) {
        state.mapper.survey(c, std::span(&m, 1));
        if (refers(m))
            return std::nullopt;
    }
    // Most snapshots share their tables: each is asked once.
    const std::shared_lock guard(state.l1.lock(g.l1_index(c)));
    std::vector<std::pair<HostOffset, bool>> asked;
    for (const auto &snapshot : state.snapshots.list()) {
        const HostOffset table = snapshot->table(g.l1_index(c));
        if (table.value == 0)
            continue;
        auto known = std::find_if(asked.begin(), asked.end(), [&](const auto &a) { return a.first == table; });
        if (known == asked.end())
            known = asked.insert(asked.end(),
                                 {table, refers(state.mapper.judged(c, read_entry(state, entry_home(g, table, c))))});
        if (known->second)
            found.snapshots.push_back(snapshot);
    }
    return found;
}

/// With `c` in the range lock, exclusively: points all of them at `to`, which has their contents. Each keeps its flag,
/// for the clusters have the same refcount; but a cluster that has turned out to be the active image's alone gets it.
void point_all_at(State &state, GuestCluster c, const Referrers &referrers, HostCluster to) {
    const Geometry &g = state.geometry;
    const std::uint64_t i = g.l1_index(c);
    const auto moved = [&](std::uint64_t word) { return (word & ~entry::offset_mask) | g.offset_of(to).value; };
    std::optional<Mapper::Editor> editor;
    std::optional<std::shared_lock<RwLock>> l1_guard; // an editor holds it too
    if (referrers.active)
        editor.emplace(state.mapper, c, 1);
    else
        l1_guard.emplace(state.l1.lock(i));
    struct Change {
        HostOffset at;
        std::uint64_t word;
    };
    std::vector<Change> changes;
    for (const auto &snapshot : referrers.snapshots) {
        const HostOffset at = entry_home(g, snapshot->table(i), c);
        if (std::none_of(changes.begin(), changes.end(), [&](const Change &change) { return change.at == at; }))
            changes.push_back({at, moved(read_entry(state, at).entry)});
    }
    // Nothing fails from here on. The references are recorded before anything points there.
    state.allocator.add_references({to, 1}, referrers.count() - 1);
    if (editor) {
        L2Words words = editor->words(c);
        words.entry = moved(words.entry) | (referrers.count() == 1 ? entry::copied : 0);
        editor->set_words(c, words);
    }
    // Where a snapshot shares the table with the active image the word is in both places, and stays pending for the
    // snapshot's sake if the active image gets a table of its own before it is written.
    for (const Change &change : changes)
        state.snapshots.pending.store(change.at, change.word);
}

/// relocate() of a cluster that snapshots refer to: once, with every reference. Compressed clusters do not move.
Moved relocate_shared(State &state, GuestCluster c, HostCluster source, const Allocator::Extent &destination,
                      bool *used) {
    const Geometry &g = state.geometry;
    std::vector<std::byte> bytes(g.cluster_size());
    const HostOffset from = g.offset_of(source), to = g.offset_of(destination.run.first);
    for (bool warmed = false;; warmed = true) {
        {
            const RangeLock::Exclusive guard(state.ranges, g.offset_of(c), 1, std::try_to_lock);
            if (!guard.owns())
                return Moved::contended;
            const auto referrers = find_referrers(state, c, source);
            if (!referrers || referrers->count() == 0)
                return Moved::gone;
            if (warmed)
                state.data.read(bytes, from);
            if (warmed || state.data.read_cached(bytes, from)) {
                write_cluster(state.data, bytes, to, destination.zero && state.data.holes_are_zeroes());
                point_all_at(state, c, *referrers, destination.run.first);
                *used = true;
                // One for each reference; other references to the cluster, if there are any, keep it.
                std::vector<HostRun> retired(referrers->count(), HostRun{source, 1});
                state.allocator.retire(retired);
                return Moved::yes;
            }
        }
        state.data.read(bytes, from);
    }
}

/// The active image's alone, as far as its entry says.
bool is_own(const State &state, const Mapping &m, HostCluster source) {
    return m.has_host() && m.host == source && (m.copied || !state.snapshots.any());
}

Moved relocate_own(State &state, GuestCluster c, HostCluster source, const Allocator::Extent &destination, bool *used) {
    const Geometry &g = state.geometry;
    std::vector<std::byte> bytes(g.cluster_size());
    const HostOffset from = g.offset_of(source), to = g.offset_of(destination.run.first);
    *used = false;
    for (bool warmed = false;; warmed = true) {
        bool moved = false;
        Mapping before;
        state.mapper.resolve(c, std::span(&before, 1)); // brings the L2 slice into memory, before the lock
        if (!is_own(state, before, source))
            return Moved::gone;
        {
            const RangeLock::Exclusive guard(state.ranges, g.offset_of(c), 1, std::try_to_lock);
            if (!guard.owns())
                return Moved::contended;
            Mapping m;
            state.mapper.resolve(c, std::span(&m, 1));
            if (!is_own(state, m, source))
                return Moved::gone;
            const auto pieces = pieces_with_data(g, m);
            const bool copy = !pieces.empty();
            bool in_memory = true;
            for (const auto &[within, length] : pieces) {
                const auto piece = std::span(bytes).subspan(within, length);
                // Once warmed it is in memory, even where the host cannot promise that (RWF_NOWAIT on tmpfs).
                if (warmed)
                    state.data.read(piece, from + within);
                else
                    in_memory = in_memory && state.data.read_cached(piece, from + within);
            }
            if (in_memory) {
                for (const auto &[within, length] : pieces)
                    write_cluster(state.data, std::span(bytes).subspan(within, length), to + within,
                                  destination.zero && state.data.holes_are_zeroes());
                if (copy && m.is_mixed() && !destination.zero)
                    subclusters::punch_all_but(state, destination.run.first, subclusters::bitmap_of(m).data());
                Mapper::Editor editor(state.mapper, c, 1);
                if (m.is_mixed())
                    editor.set_words(c, {copy ? entry::data(to) : 0, m.bits});
                else if (copy)
                    editor.set_data(c, destination.run.first);
                else
                    editor.set_zero(c);
                *used = copy;
                moved = true;
            }
            if (moved) // within the range: a walk that waits for it finds the source unlinked and retired, or neither
                state.allocator.retire({{source, 1}});
        }
        if (moved)
            return Moved::yes;
        // Not in the host's memory: read it with nobody waiting, then try again.
        state.data.read(bytes, from);
    }
}

} // namespace

Moved relocate(State &state, GuestCluster c, HostCluster source, const Allocator::Extent &destination, bool *used) {
    *used = false;
    if (state.snapshots.any()) {
        Mapping m;
        if (c.value < state.geometry.guest_clusters())
            state.mapper.resolve(c, std::span(&m, 1));
        if (!is_own(state, m, source))
            return relocate_shared(state, c, source, destination, used);
    }
    return relocate_own(state, c, source, destination, used);
}

std::optional<Allocator::Extent> relocate_into(State &state, GuestCluster c, HostCluster source,
                                               Allocator::Reservation &room, const std::function<void()> &give_back) {
    auto destination = room.extents().front();
    destination.run.count = 1;
    const auto moves = [&] {
        bool used = false;
        return relocate(state, c, source, destination, &used) == Moved::yes && used;
    };
    std::optional<bool> moved;
    try {
        moved = moves();
    } catch (const Error &error) {
        if (error.kind() != Error::Kind::no_space)
            throw;
    }
    if (!moved) {
        give_back();
        destination.zero = false; // the attempt that failed may have left something
        moved = moves();
    }
    if (!*moved)
        return std::nullopt;
    room.take_first();
    return destination;
}

} // namespace qlean
