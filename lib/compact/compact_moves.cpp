// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// What Compact does in CACHE: the clusters of a range go down. A short range is moved as a whole, in guest order. Of a
// long one goes what lies highest in the file, so much of it that the request ends soon, in the order of the file:
// neighbours leave one hole, and stay neighbours.
#include "compact.h"

#include "metadata_moves.h"
#include "relocator.h"

#include <algorithm>

namespace qlean {

namespace {

/// Clusters to move that are looked for in one range, which bounds the memory; and L2 tables, which move at once.
constexpr std::size_t most_found = std::size_t{1} << 20, most_tables = 1024;
/// Between two places that are written out by one call.
constexpr std::uint64_t gap_bytes = 1024 * 1024;

} // namespace

Compact::Work Compact::find_work(GuestCluster first, GuestCluster last, const Wanted &want) {
    const HostCluster end = want.end;
    const Geometry &g = state_.geometry;
    Work work;
    std::vector<Mapping> mappings;
    for (GuestCluster c = first;
         c <= last && work.clusters.size() + work.extents.size() < most_found && work.tables.size() < most_tables;) {
        const GuestCluster stop = std::min({last + 1, state_.mapper.table_end(c), c + batch});
        if (state_.mapper.has_table(c)) {
            mappings.resize(stop - c);
            state_.mapper.survey(c, mappings);
            bool asked_for_table = g.cluster_of(state_.l1.table(g.l1_index(c))) < end;
            for (std::size_t i = 0; i < mappings.size(); ++i) {
                if (to_repack(mappings[i], want))
                    work.extents.emplace_back(c + i, mappings[i].bits);
                if (!mappings[i].has_host())
                    continue;
                if (state_.mapper.is_in_image(mappings[i]) && mappings[i].host >= end)
                    work.clusters.emplace_back(c + i, mappings[i].host);
                if (!asked_for_table) {
                    asked_for_table = true;
                    if (table_moves_with(c + i, mappings, c, end))
                        work.tables.push_back(g.l1_index(c));
                }
            }
        }
        c = stop;
    }
    return work;
}

void Compact::run(GuestOffset at, std::uint64_t length, const StopCheck &stop) {
    const Geometry &g = state_.geometry;
    state_.write_back.before_change();
    ownership_.claim(name_, connection_);
    const Wanted want = wanted(stop);
    const HostCluster end = want.end;
    {
        // Before anything moves: what has moved is no longer what the walk found.
        const Lock guard(mutex_);
        retire_leaked(stop);
    }
    Work work = find_work(g.cluster_of(at), g.cluster_of(at + (length - 1)), want);
    if (!work.tables.empty()) {
        const auto no_walk = keep_walks_out();
        state_.write_back.lead([&] {
            for (const std::uint64_t i : work.tables)
                if (move_l2_table(state_, i, end))
                    gauges_.moved_bytes += g.cluster_size();
        });
    }
    if (!work.clusters.empty())
        move_plain(work, want, stop);
    move_extents(work, want, stop);
}

void Compact::move_plain(Work &work, const Wanted &want, const StopCheck &stop) {
    if (want.emptied && state_.allocator.retired_bytes() != 0 &&
        state_.allocator.free_below(want.end) - state_.allocator.free_below(want.site_end) < work.clusters.size())
        image_.give_back(); // what was emptied just now
    if (work.clusters.size() > most_)
        return move_highest(work, want, stop);
    // All destinations at once, so that requests in parallel do not shred guest order.
    auto room = state_.allocator.reserve_below(work.clusters.size(), want.end, want.site_end);
    std::vector<HostRun> written;
    for (const auto &[cluster, source] : work.clusters) {
        if (room.empty())
            break;
        if (const auto place = move_one(cluster, source, room, want, stop))
            append_run(written, {*place, 1});
    }
    // Early, so that nobody's sync has much to wait for; with what little of others lies in between.
    const Geometry &g = state_.geometry;
    for (auto run = written.begin(); run != written.end();) {
        const HostCluster first = run->first;
        HostCluster last = run->end();
        for (++run; run != written.end() && run->first >= last && g.bytes(run->first - last) <= gap_bytes; ++run)
            last = run->end();
        state_.data.start_writing_out(g.offset_of(first), g.bytes(last - first));
    }
}

void Compact::move_highest(Work &work, const Wanted &want, const StopCheck &stop) {
    auto room = state_.allocator.reserve_below(most_, want.end, want.site_end);
    const auto higher = [](const auto &a, const auto &b) { return a.second > b.second; };
    const auto middle = work.clusters.begin() + static_cast<std::ptrdiff_t>(room.count());
    std::nth_element(work.clusters.begin(), middle, work.clusters.end(), higher);
    std::sort(work.clusters.begin(), middle, higher);
    for (auto at = middle; at != work.clusters.begin() && !room.empty();) {
        --at;
        (void)move_one(at->first, at->second, room, want, stop);
    }
}

/// Where it is now, if it has moved.
std::optional<HostCluster> Compact::move_one(GuestCluster cluster, HostCluster source, Allocator::Reservation &room,
                                             const Wanted &want, const StopCheck &stop) {
    require_going(stop);
    const std::uint64_t bytes = state_.geometry.cluster_size();
    auto share = room_for(bytes, want);
    const auto destination = relocate_into(state_, cluster, source, room, [&] { image_.give_back(); });
    if (!destination)
        return std::nullopt;
    share.moved();
    gauges_.moved_bytes += bytes;
    return destination->run.first;
}

} // namespace qlean
