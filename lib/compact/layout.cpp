// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "layout.h"

#include "bitmap_moves.h"
#include "snapshot_moves.h"

namespace qlean {

Layout Layout::measure(State &state, std::uint64_t live, std::uint64_t leaked, std::uint64_t empty_tables) {
    const Geometry &g = state.geometry;
    const auto blocks = state.refcounts.blocks();
    const std::uint64_t table_now = state.refcounts.table_clusters();
    const std::uint64_t region_clusters = state.refcounts.region_clusters();
    const std::uint64_t going = std::min(live, blocks.size() + table_now + leaked + empty_tables);
    const std::uint64_t base = live - going;

    Layout layout;
    layout.table_clusters = table_now;
    // Grows monotonically from too low an end, so it stops at the least fixpoint.
    for (std::uint64_t end = base;;) {
        layout.last_region = state.write_back.last_region_wanted(end, layout.table_clusters);
        const std::uint64_t wanted_table = g.clusters_for((layout.last_region + 1) * 8);
        layout.table_clusters = wanted_table * 2 <= table_now ? wanted_table : table_now;
        std::uint64_t kept = 0, unusable = 0, next_region = 0;
        for (const auto &[region, cluster] : blocks) {
            kept += region <= layout.last_region;
            // Nothing can be put where there is no refcount block. What comes behind the last one is linked in time.
            if (const std::uint64_t gap = next_region * region_clusters; gap < end && region > next_region)
                unusable += std::min(end, region * region_clusters) - gap;
            next_region = region + 1;
        }
        // The table keeps its length until blocks beyond its new one are gone, and these go when the file has been cut.
        const bool keeps_length = !blocks.empty() && blocks.back().first >= g.bytes(layout.table_clusters) / 8;
        const std::uint64_t needed = base + kept + (keeps_length ? table_now : layout.table_clusters) + unusable;
        if (needed <= end) {
            layout.end = {end};
            break;
        }
        end = needed;
    }

    layout.pending =
        leaked + empty_tables + bitmap_clusters_beyond(state, layout.end) + snapshot_clusters_beyond(state, layout.end);
    for (const auto &[region, cluster] : blocks)
        layout.pending += cluster >= layout.end || region > layout.last_region;
    for (std::uint64_t i = 0; i < state.l1.size(); ++i)
        if (const HostOffset table = state.l1.table(i); table.value != 0)
            layout.pending += g.cluster_of(table) >= layout.end;
    if (const std::uint64_t n = g.clusters_for(state.l1.size() * 8);
        beyond({g.cluster_of(state.l1.home()), n}, layout.end))
        layout.pending += n;
    if (layout.table_clusters != table_now || beyond({g.cluster_of(state.refcounts.home()), table_now}, layout.end))
        layout.pending += table_now;
    return layout;
}

} // namespace qlean
