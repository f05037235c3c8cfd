// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "relocator.h"

#include "../error.h"
#include "../subcluster_change.h"
#include "referrers.h"
#include "zero_bytes.h"

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

/// Under the range lock: no device is waited for, unless that has been done before (`warmed`), when what is asked for
/// is in memory even where the host cannot promise that (RWF_NOWAIT on tmpfs). False: it would have to be; nothing is
/// done.
bool source_to_destination(State &state, const std::vector<subclusters::Piece> &pieces, HostOffset from,
                           const Allocator::Extent &destination, std::span<std::byte> bytes, bool warmed) {
    const HostOffset to = state.geometry.offset_of(destination.run.first);
    if (pieces.size() == 1 && pieces.front().length == bytes.size() && state.data.share(from, to, bytes.size()))
        return true;
    for (const auto &[within, length] : pieces) {
        const auto piece = bytes.subspan(within, length);
        if (warmed)
            state.data.read(piece, from + within);
        else if (!state.data.read_cached(piece, from + within))
            return false;
    }
    for (const auto &[within, length] : pieces)
        write_cluster(state.data, bytes.subspan(within, length), to + within,
                      destination.zero && state.data.holes_are_zeroes());
    return true;
}

/// relocate() of a cluster that snapshots refer to: once, with every reference.
Moved relocate_shared(State &state, GuestCluster c, HostCluster source, const Allocator::Extent &destination,
                      bool *used) {
    const Geometry &g = state.geometry;
    std::vector<std::byte> bytes(g.cluster_size());
    const HostOffset from = g.offset_of(source), to = g.offset_of(destination.run.first);
    warm_referrers(state, c);
    for (bool warmed = false;; warmed = true) {
        state.data.prepare_to_share(from, g.cluster_size());
        {
            const RangeLock::Exclusive guard(state.ranges, g.offset_of(c), 1, std::try_to_lock);
            if (!guard.owns())
                return Moved::contended;
            const auto referrers =
                find_referrers(state, c, [&](const Mapping &m) { return m.has_host() && m.host == source; });
            if (!referrers || referrers->count() == 0)
                return Moved::gone;
            if (source_to_destination(state, {{0, g.cluster_size()}}, from, destination, bytes, warmed)) {
                // Each keeps its flag, for the clusters have the same refcount; but one that has turned out to be the
                // active image's alone gets it.
                const std::uint64_t flag = referrers->active && referrers->count() == 1 ? entry::copied : 0;
                change_all(
                    state, c, *referrers,
                    [&](std::uint64_t word) { return (word & ~entry::offset_mask) | to.value | flag; },
                    [&] {
                        state.allocator.add_references({destination.run.first, 1}, referrers->count() - 1);
                    });
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
        if (!is_own(state, state.mapper.look(c), source)) // brings the L2 slice into memory, before the lock
            return Moved::gone;
        state.data.prepare_to_share(from, g.cluster_size());
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
            if (source_to_destination(state, pieces, from, destination, bytes, warmed)) {
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
        const bool in_disk = c.value < state.geometry.guest_clusters();
        if (!in_disk || !is_own(state, state.mapper.look(c), source))
            return relocate_shared(state, c, source, destination, used);
    }
    return relocate_own(state, c, source, destination, used);
}

std::optional<Allocator::Extent> relocate_into(State &state, GuestCluster c, HostCluster source,
                                               Allocator::Reservation &room, const std::function<void()> &give_back) {
    const auto moves = [&] {
        auto destination = room.extents().front();
        destination.run.count = 1;
        bool used = false;
        return relocate(state, c, source, destination, &used) == Moved::yes && used;
    };
    std::optional<bool> moved;
    try {
        moved = moves();
    } catch (const Error &error) {
        if (error.kind() != Error::Kind::no_space)
            throw;
        room.distrust_first(); // for whoever gets it: what failed may have left something
    }
    if (!moved) {
        give_back();
        moved = moves();
    }
    if (!*moved)
        return std::nullopt;
    return room.take_first();
}

} // namespace qlean
