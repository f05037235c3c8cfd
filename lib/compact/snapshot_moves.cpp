// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "snapshot_moves.h"

#include "../byte_order.h"
#include "relocator.h"
#include "whole_moves.h"

#include <algorithm>
#include <set>
#include <shared_mutex>
#include <tuple>
#include <unordered_set>

namespace qlean {

namespace {

constexpr std::uint64_t max_batch = 8192;
constexpr std::uint64_t most_entries = 1024 * 1024; ///< of all tables of an L1 index, at a time
constexpr std::uint64_t min_batch = 64;

std::uint64_t longest_l1(const std::vector<SnapshotPointer> &snapshots) {
    std::uint64_t longest = 0;
    for (const auto &snapshot : snapshots)
        longest = std::max(longest, snapshot->l1_size());
    return longest;
}

/// The tables of L1 index `i` that only snapshots have, each with a snapshot that has it.
std::vector<std::pair<HostOffset, SnapshotPointer>> own_tables(State &state, std::uint64_t i,
                                                               const std::vector<SnapshotPointer> &snapshots) {
    std::vector<std::pair<HostOffset, SnapshotPointer>> found;
    std::unordered_set<std::uint64_t> known;
    const HostOffset active = i < state.l1.size() ? state.l1.table(i) : HostOffset{0};
    for (const auto &snapshot : snapshots) {
        const HostOffset table = snapshot->table(i);
        if (table.value == 0 || table == active)
            continue;
        if (known.insert(table.value).second)
            found.emplace_back(table, snapshot);
    }
    return found;
}

/// Both have the same cluster, or the same extent.
bool at_one_place(const Mapping &a, const Mapping &b) {
    if (a.kind == Mapping::Kind::compressed || b.kind == Mapping::Kind::compressed)
        return a.kind == b.kind && a.bits == b.bits;
    return a.has_host() && b.has_host() && a.host == b.host;
}

/// What wants adjacent clusters: the L1 tables, and the snapshot table.
template <class F>
void for_each_adjacent(const State &state, F &&f) {
    if (!state.snapshots.any())
        return;
    for (const auto &snapshot : state.snapshots.list())
        f(snapshot->l1_run(state.geometry));
    f(state.snapshots.table_run());
}

} // namespace

void each_snapshot_mapping(State &state, const StopCheck &stop,
                           const std::function<void(GuestCluster, const Mapping &)> &each) {
    struct Met {
        std::size_t n;
        Mapping mapping;
        /// By entry, and then by place.
        auto key() const { return std::tuple(n, mapping.has_host(), mapping.host.value, mapping.bits); }
    };
    const Geometry &g = state.geometry;
    const auto snapshots = state.snapshots.list();
    const std::uint64_t longest = longest_l1(snapshots);
    std::vector<Mapping> mappings, active;
    std::vector<Met> met;
    for (std::uint64_t i = 0; i < longest; ++i) {
        const auto tables = own_tables(state, i, snapshots);
        if (tables.empty())
            continue;
        const bool has_active = i < state.l1.size() && state.l1.table(i).value != 0;
        const std::uint64_t at_a_time = std::clamp(most_entries / tables.size(), min_batch, max_batch);
        for (std::uint64_t at = i * g.l2_entries(); at < (i + 1) * g.l2_entries(); at += mappings.size()) {
            mappings.resize(std::min(at_a_time, (i + 1) * g.l2_entries() - at));
            active.assign(mappings.size(), Mapping{});
            if (has_active)
                state.mapper.survey({at}, active);
            met.clear();
            for (const auto &[table, snapshot] : tables) {
                require_going(stop);
                state.mapper.survey(*snapshot, {at}, mappings);
                for (std::size_t n = 0; n < mappings.size(); ++n)
                    if (at_one_place(mappings[n], mappings[n]) && !at_one_place(mappings[n], active[n]))
                        met.push_back({n, mappings[n]});
            }
            std::ranges::sort(met, {}, &Met::key);
            for (std::size_t k = 0; k < met.size(); ++k)
                if (k == 0 || met[k].n != met[k - 1].n || !at_one_place(met[k].mapping, met[k - 1].mapping))
                    each({at + met[k].n}, met[k].mapping);
        }
    }
}

SnapshotWork find_snapshot_work(State &state, HostCluster end, const std::function<bool(const Mapping &)> &to_repack,
                                std::size_t most, const StopCheck &stop) {
    const Geometry &g = state.geometry;
    SnapshotWork work;
    if (!state.snapshots.any())
        return work;
    each_snapshot_mapping(state, stop, [&](GuestCluster c, const Mapping &m) {
        if (m.has_host() ? m.host < end : !to_repack(m))
            return;
        ++work.pending;
        if (m.has_host() && work.clusters.size() < most)
            work.clusters.emplace_back(c, m.host);
        if (!m.has_host() && work.extents.size() < most)
            work.extents.emplace_back(c, m.bits);
    });
    const auto snapshots = state.snapshots.list();
    const std::uint64_t longest = longest_l1(snapshots);
    for (std::uint64_t i = 0; i < longest; ++i)
        for (const auto &[table, snapshot] : own_tables(state, i, snapshots)) {
            if (g.cluster_of(table) < end)
                continue;
            ++work.pending;
            if (work.tables.size() < most)
                work.tables.emplace_back(i, table);
        }
    return work;
}

std::uint64_t snapshot_clusters_beyond(const State &state, HostCluster end) {
    std::uint64_t n = 0;
    for_each_adjacent(state, [&](const HostRun &run) { n += beyond(run, end) ? run.count : 0; });
    return n;
}

std::uint64_t move_snapshot_clusters(State &state, const SnapshotWork &work, HostCluster end,
                                     const std::function<void()> &give_back, const StopCheck &stop) {
    std::uint64_t moved = 0;
    auto room = state.allocator.reserve_below(work.clusters.size(), end);
    for (const auto &[c, source] : work.clusters) {
        if (room.empty())
            break;
        require_going(stop);
        if (source >= end)
            moved += relocate_into(state, c, source, room, give_back).has_value();
    }
    return moved;
}

std::vector<SnapshotPointer> snapshots_with_table(State &state, std::uint64_t i, HostOffset table) {
    std::vector<SnapshotPointer> found;
    if (state.snapshots.any())
        for (auto &snapshot : state.snapshots.list())
            if (snapshot->table(i) == table)
                found.push_back(std::move(snapshot));
    return found;
}

bool may_move_table(const State &state, HostOffset table) {
    return !state.snapshots.pending.any_in(table, state.geometry.cluster_size());
}

void relink_snapshots(State &state, std::uint64_t i, const std::vector<SnapshotPointer> &snapshots, HostOffset table) {
    for (const auto &snapshot : snapshots) {
        const std::uint64_t word = (snapshot->word(i) & ~entry::offset_mask) | table.value;
        snapshot->set_word(i, word);
        state.snapshots.pending.store(snapshot->l1_home() + i * 8, word);
    }
}

bool move_snapshot_l2_table(State &state, std::uint64_t i, HostOffset table, HostCluster end) {
    const Geometry &g = state.geometry;
    if (g.cluster_of(table) < end)
        return false;
    auto reserved = state.allocator.reserve_below(1, end);
    if (reserved.empty())
        return false;
    const HostCluster destination = reserved.extents().front().run.first;
    std::vector<HostRun> retired;
    {
        const std::lock_guard guard(state.l1.lock(i));
        if (i < state.l1.size() && state.l1.table(i) == table)
            return false;
        const auto sharers = snapshots_with_table(state, i, table);
        if (sharers.empty() || !may_move_table(state, table))
            return false;
        std::vector<std::byte> bytes(g.cluster_size());
        state.file.read(bytes, table);
        state.file.write(bytes, g.offset_of(destination));
        state.allocator.add_references({destination, 1}, sharers.size() - 1);
        relink_snapshots(state, i, sharers, g.offset_of(destination));
        retired.assign(sharers.size(), HostRun{g.cluster_of(table), 1});
    }
    reserved.publish();
    state.allocator.retire(retired);
    return true;
}

void move_snapshot_l1_tables(State &state, HostCluster end, std::uint64_t most) {
    const Geometry &g = state.geometry;
    std::vector<WholeMove> moves;
    std::vector<std::size_t> moving; // the snapshot of each
    const auto snapshots = state.snapshots.list();
    std::uint64_t clusters = 0;
    for (std::size_t n = 0; n < snapshots.size() && clusters < most; ++n) {
        const HostRun run = snapshots[n]->l1_run(g);
        if (!beyond(run, end) || state.snapshots.pending.any_in(g.offset_of(run.first), g.bytes(run.count)))
            continue;
        auto room = state.allocator.reserve_contiguous_below(run.count, end);
        if (room.empty())
            continue;
        clusters += run.count;
        moves.push_back({run, std::move(room)});
        moving.push_back(n);
    }
    const HostOffset table = g.offset_of(state.snapshots.table_run().first);
    carry_out(state, moves, [&](const std::vector<HostCluster> &to) {
        const auto positions = state.snapshots.table_without(nullptr).positions();
        for (std::size_t m = 0; m < moves.size(); ++m) {
            const HostOffset home = g.offset_of(to[m]);
            const std::uint64_t word = big_endian(home.value);
            state.file.write(std::as_bytes(std::span(&word, 1)), table + positions[moving[m]]);
            snapshots[moving[m]]->set_l1_home(home);
        }
    });
}

void move_snapshot_table(State &state, HostCluster end) {
    const HostRun now = state.snapshots.table_run();
    if (!beyond(now, end))
        return;
    auto room = state.allocator.reserve_contiguous_below(now.count, end);
    if (!room.empty())
        store_snapshot_table(state, std::move(room), nullptr);
}

void store_snapshot_table(State &state, Allocator::Reservation room, const Snapshot *gone) {
    const Geometry &g = state.geometry;
    const SnapshotTable table = state.snapshots.table_without(gone);
    auto bytes = table.encode();
    const std::uint64_t length = bytes.size();
    bytes.resize(g.bytes(g.clusters_for(length)));
    HostOffset home{0};
    if (length != 0) {
        home = g.offset_of(room.extents().front().run.first);
        state.file.write(bytes, home);
        state.write_back.write_refcounts_as_leader();
        state.write_back.sync_as_leader();
    }
    room.publish();
    const HostRun old = state.snapshots.table_run();
    state.write_back.switch_as_leader([&] {
        state.header.update([&](Header &h) {
            h.snapshot_count = static_cast<std::uint32_t>(table.entries.size());
            h.snapshots_offset = home;
        });
    });
    state.snapshots.moved(home, length, gone);
    state.allocator.retire({old});
}

std::uint64_t adjacent_clusters_of_snapshots(State &state, HostCluster end) {
    std::uint64_t most = 0;
    for_each_adjacent(state, [&](const HostRun &run) { most = std::max(most, beyond(run, end) ? run.count : 0); });
    return most;
}

} // namespace qlean
