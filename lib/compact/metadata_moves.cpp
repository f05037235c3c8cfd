// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "metadata_moves.h"

#include "../byte_order.h"
#include "bitmap_moves.h"
#include "relocator.h"
#include "snapshot_moves.h"

#include <mutex>

namespace qlean {

namespace {

void write_words(State &state, const std::vector<std::uint64_t> &words, HostOffset at) {
    state.file.write(std::as_bytes(std::span(words)), at);
}

void write_table_entry(State &state, std::uint64_t region, HostOffset block) {
    write_words(state, {big_endian(block.value)}, state.refcounts.home() + region * 8);
}

/// What lies from here on is described by blocks that will be dropped.
HostCluster first_region_to_go(const State &state, const Layout &layout) {
    return {(layout.last_region + 1) * state.refcounts.region_clusters()};
}

/// Where blocks that will be dropped wait, and the table that has to keep its length for them: from E to here. Close to
/// E, or the file could not be cut to where they can be dropped.
HostCluster waiting_end(const State &state, const Layout &layout) {
    std::uint64_t waiting = state.refcounts.table_clusters();
    for (const auto &[region, cluster] : state.refcounts.blocks())
        waiting += region > layout.last_region;
    return std::min(layout.end + 2 * waiting, first_region_to_go(state, layout));
}

} // namespace

bool move_l2_table(State &state, std::uint64_t i, HostCluster end) {
    const Geometry &g = state.geometry;
    if (state.l1.table(i).value == 0 || g.cluster_of(state.l1.table(i)) < end)
        return false;
    auto reserved = state.allocator.reserve_below(1, end);
    if (reserved.empty())
        return false;
    const HostCluster destination = reserved.extents().front().run.first;
    std::vector<HostRun> retired;
    {
        const std::lock_guard guard(state.l1.lock(i));
        const HostOffset home = state.l1.table(i);
        if (home.value == 0)
            return false;
        const auto sharers = snapshots_with_table(state, i, home);
        if (!may_move_table(state, home))
            return false;
        write_words(state, state.l2.whole_table(i), g.offset_of(destination));
        retired.assign(1 + sharers.size(), HostRun{g.cluster_of(home), 1});
        if (sharers.empty()) {
            state.l1.relink(i, g.offset_of(destination));
        } else {
            state.allocator.add_references({destination, 1}, sharers.size());
            state.l1.relink_shared(i, g.offset_of(destination));
            relink_snapshots(state, i, sharers, g.offset_of(destination));
        }
    }
    reserved.publish();
    state.allocator.retire(retired);
    return true;
}

void drop_empty_table(State &state, std::uint64_t i) {
    HostCluster home;
    {
        const std::lock_guard guard(state.l1.lock(i));
        if (state.l1.table(i).value == 0)
            return;
        const auto words = state.l2.whole_table(i);
        const std::uint64_t step = state.geometry.entry_words();
        for (std::size_t w = 0; w < words.size(); w += step) {
            const L2Words entry{big_endian(words[w]), step == 2 ? big_endian(words[w + 1]) : 0};
            const GuestCluster c{i * state.geometry.l2_entries() + w / step};
            if (!state.contents.is_nothing(c, entry::decode(entry, state.mapper.format())))
                return;
        }
        home = state.geometry.cluster_of(state.l1.table(i));
        state.l1.unlink(i);
        state.l2.discard_table(i);
    }
    state.allocator.retire({{home, 1}});
}

void drop_refcount_blocks(State &state, const Layout &layout) {
    std::vector<HostRun> dropped;
    std::vector<std::uint64_t> regions;
    state.allocator.with_fixed_length([&](std::uint64_t end) {
        // Not those that the next commit would link again. What the file as it is should have is more than that: were
        // it kept, blocks that are all there is beyond E would stay for their own sake.
        const std::uint64_t wanted = state.write_back.last_region_wanted(end, state.refcounts.table_clusters());
        const std::uint64_t last =
            std::max(state.write_back.last_region_needed(end), std::min(layout.last_region, wanted));
        for (const auto &[region, cluster] : state.refcounts.blocks()) {
            if (end > region * state.refcounts.region_clusters() || region <= last)
                continue;
            // In memory first: from here on the file does not grow into the region.
            state.refcounts.set_block(region, HostOffset{0});
            regions.push_back(region);
            dropped.push_back({cluster, 1});
        }
    });
    if (dropped.empty())
        return;
    state.write_back.switch_as_leader([&] {
        for (const std::uint64_t region : regions)
            write_table_entry(state, region, HostOffset{0});
    });
    state.allocator.retire(dropped);
}

void move_refcount_blocks(State &state, const Layout &layout, std::uint64_t most) {
    const Geometry &g = state.geometry;
    struct Move {
        std::uint64_t region;
        HostCluster from, to;
    };
    std::vector<Move> moves;
    std::vector<Allocator::Reservation> reserved;
    // A block that will be dropped may lie in the region it describes, and so keep the file from being cut to where it
    // can be dropped; or below E, where there is room for everything but such blocks. It waits in between.
    const HostCluster waits_below = waiting_end(state, layout);
    for (const auto &[region, cluster] : state.refcounts.blocks()) {
        const bool goes = region > layout.last_region;
        const HostCluster floor = goes ? layout.end : HostCluster{0}, limit = goes ? waits_below : layout.end;
        if ((cluster >= floor && cluster < limit) || moves.size() >= most)
            continue;
        auto room = state.allocator.reserve_below(1, limit, floor);
        if (room.empty())
            continue;
        moves.push_back({region, cluster, room.extents().front().run.first});
        reserved.push_back(std::move(room));
    }
    if (moves.empty())
        return;
    // The destinations' own refcounts are part of what is copied, wherever they live.
    state.write_back.write_refcounts_as_leader();
    std::vector<std::byte> bytes(g.cluster_size());
    for (const Move &move : moves) {
        state.file.read(bytes, g.offset_of(move.from));
        state.file.write(bytes, g.offset_of(move.to));
    }
    state.write_back.sync_as_leader();
    for (auto &room : reserved)
        room.publish();
    state.write_back.switch_as_leader([&] {
        for (const Move &move : moves)
            write_table_entry(state, move.region, g.offset_of(move.to));
    });
    std::vector<HostRun> old;
    for (const Move &move : moves) {
        state.refcounts.set_block(move.region, g.offset_of(move.to));
        old.push_back({move.from, 1});
    }
    state.allocator.retire(old);
}

void move_refcount_table(State &state, const Layout &layout) {
    const Geometry &g = state.geometry;
    const HostRun old = state.refcounts.table_run();
    if (layout.table_clusters == old.count && !beyond(old, layout.end))
        return;
    // As long as blocks that go are still there it must keep its length, and waits where they do: otherwise a table at
    // the end would keep the file from being cut to where they can be dropped.
    const HostCluster waits_below = waiting_end(state, layout);
    std::uint64_t clusters = layout.table_clusters;
    HostCluster floor{0}, limit = layout.end;
    for (const auto &[region, cluster] : state.refcounts.blocks())
        if (region >= g.bytes(clusters) / 8) {
            if (old.end() <= waits_below)
                return;
            clusters = old.count;
            floor = layout.end;
            limit = waits_below;
        }
    const std::uint64_t entries = g.bytes(clusters) / 8;
    auto room = state.allocator.reserve_contiguous_below(clusters, limit, floor);
    if (room.empty())
        return;
    const HostOffset home = g.offset_of(room.extents().front().run.first);
    state.write_back.write_refcounts_as_leader();
    write_words(state, state.refcounts.table_words(0, entries), home);
    state.write_back.sync_as_leader();
    room.publish();
    state.write_back.switch_as_leader([&] {
        state.header.update([&](Header &h) {
            h.refcount_table_offset = home;
            h.refcount_table_clusters = static_cast<std::uint32_t>(clusters);
        });
    });
    state.refcounts.set_table(home, entries);
    state.allocator.retire({old});
}

void move_l1_table(State &state, const Layout &layout) {
    const HostRun old = state.l1.run(state.geometry);
    if (!beyond(old, layout.end))
        return;
    auto room = state.allocator.reserve_contiguous_below(old.count, layout.end);
    if (room.empty())
        return;
    state.write_back.move_l1_as_leader(std::move(room), state.l1.size());
}

// --- making room for what must be adjacent ------------------------------------------------------------------------

std::uint64_t adjacent_clusters_wanted(State &state, const Layout &layout) {
    const Geometry &g = state.geometry;
    std::uint64_t most = adjacent_bitmap_clusters_wanted(state, layout.end);
    if (const HostRun l1 = state.l1.run(state.geometry); beyond(l1, layout.end))
        most = std::max(most, l1.count);
    if (const HostRun table = state.refcounts.table_run();
        layout.table_clusters != table.count || beyond(table, layout.end)) {
        // As long as it has to keep its length for blocks that go, it moves at most to where they wait: a window would
        // be emptied for nothing, and the guest's clusters that leave it take the room of those that come down.
        const auto blocks = state.refcounts.blocks();
        if (blocks.empty() || blocks.back().first < g.bytes(layout.table_clusters) / 8)
            most = std::max(most, layout.table_clusters);
    }
    return most;
}

bool empty_window(State &state, const Layout &layout, std::uint64_t count,
                  const std::function<void(GuestCluster, std::uint64_t)> &repack,
                  const std::function<void()> &give_back) {
    const Geometry &g = state.geometry;
    const std::uint64_t end = layout.end.value;
    if (count == 0 || count > end)
        return false;
    // What each cluster below the end is: free, mapped by a guest cluster, or neither (metadata, pinned, on its way).
    std::vector<bool> mapped(end);
    std::vector<Mapping> mappings;
    std::vector<HostRun> references;
    const auto each_mapped = [&](auto &&f) {
        const auto each_host = [&](GuestCluster c, const Mapping &m) {
            references.clear();
            state.mapper.append_references(references, m);
            for (const HostRun &run : references)
                for (HostCluster host = run.first; host < run.end() && host.value < end; ++host)
                    f(c, m, host);
        };
        for (std::uint64_t i = 0; i < state.l1.size(); ++i) {
            const GuestCluster first{i * g.l2_entries()};
            if (state.l1.table(i).value == 0 || first.value >= g.guest_clusters())
                continue;
            mappings.resize(state.mapper.table_end(first) - first);
            state.mapper.survey(first, mappings);
            for (std::size_t n = 0; n < mappings.size(); ++n)
                each_host(first + n, mappings[n]);
        }
        if (state.snapshots.any())
            each_snapshot_mapping(state, never, each_host);
    };
    each_mapped([&](GuestCluster, const Mapping &, HostCluster host) { mapped[host.value] = true; });
    // The window with the fewest clusters to move.
    std::uint64_t best = end, best_cost = count + 1, run = 0, cost = 0;
    const auto kind = [&](std::uint64_t c) { return state.allocator.is_free({c}) ? 0 : mapped[c] ? 1 : 2; };
    for (std::uint64_t c = 0; c < end; ++c) {
        const int k = kind(c);
        if (k == 2) {
            run = cost = 0;
            continue;
        }
        cost += k == 1;
        if (++run > count) {
            cost -= kind(c - count) == 1;
            run = count;
        }
        if (run == count && cost < best_cost) {
            best_cost = cost;
            best = c + 1 - count;
        }
    }
    if (best == end)
        return false;
    state.allocator.embargo({{best}, count});
    std::vector<std::pair<GuestCluster, Mapping>> in_the_way;
    each_mapped([&](GuestCluster c, const Mapping &m, HostCluster host) {
        const std::pair found(c, m); // an extent may have several of its clusters here, one after the other
        if (host.value >= best && host.value < best + count && (in_the_way.empty() || in_the_way.back() != found))
            in_the_way.push_back(found);
    });
    for (const auto &[cluster, mapping] : in_the_way) {
        if (mapping.kind == Mapping::Kind::compressed) {
            repack(cluster, mapping.bits);
            continue;
        }
        // Upwards if it must be: this happens once, and it comes down again with the rest.
        auto room = state.allocator.reserve(1, Allocator::Growth::now);
        if (room.empty())
            return true;
        (void)relocate_into(state, cluster, mapping.host, room, give_back);
    }
    return true;
}

} // namespace qlean
