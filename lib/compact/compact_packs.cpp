// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// What Compact does for compressed clusters: what it decides between two passes, and the moves.
#include "compact.h"

namespace qlean {

namespace {

constexpr int max_goal_rounds = 8;
constexpr unsigned max_emptying_passes = 4;
/// Clusters that must come free for compressed extents to be moved for their density alone. Each pass over the rest
/// takes about one that it does not fill: what was gained last time would be tried again, to end higher.
constexpr std::uint64_t worthwhile(std::uint64_t live) { return live / 64 + max_emptying_passes; }

} // namespace

/// What is to become of compressed extents, and the end and the site that follow from it. With mutex_ held, after a
/// walk.
void Compact::measure_packs(const Packs &packs) {
    const Geometry &g = state_.geometry;
    // Where a pass found a place for hardly anything of what it had to move, the next one would not either. Room to
    // empty packs in is given back when they are empty: more of it sooner.
    const std::uint64_t placed = placed_.exchange(0), unplaced = unplaced_.exchange(0);
    const bool emptying = emptied_ && !emptied_->empty();
    if (placed < unplaced / (emptying ? 2 : 16))
        slack_ += g.clusters_for(unplaced + unplaced / 2);
    packs_changed_ = false;

    const std::uint64_t live = this->live(), taken_out = taken_out_of_live();
    const auto is_free = [&](HostCluster c) { return state_.allocator.is_free(c); };
    // Decided once: what an estimate promises and does not come true must not be tried again and again.
    std::vector<bool> emptied;
    if (passes_++ == 0)
        emptied = packs.worth_emptying(worthwhile(live));
    else if (unplaced > 0 && passes_ <= max_emptying_passes)
        emptied = *emptied_;
    else if (emptied_ && !emptied_->empty())
        slack_ = 0; // it was room to empty them in
    for (std::uint64_t c = 0; c < emptied.size(); ++c)
        emptied[c] = emptied[c] && !repacker_.filled({c});
    for (;;) {
        // The end decides what has to move, and that the end.
        layout_.end = {state_.allocator.end()};
        for (int round = 0; round < max_goal_rounds; ++round) {
            const HostCluster end = layout_.end;
            const auto moving = packs.moving(emptied, end);
            const auto site = packs.site(moving.bytes, end, emptied, is_free);
            live_goal_ = live - std::min(live, moving.packs) + std::max(site.clusters, moving.least) + slack_;
            live_goal_ -= std::min(live_goal_, taken_out);
            measure();
            if (layout_.end >= end)
                break;
        }
        if (emptied.empty() || live_goal_ + taken_out + worthwhile(live) <= live + slack_)
            break;
        emptied.clear(); // too little would be gained after all
    }
    // What moves is decided by the end that came out, not by the one it was computed from: room must not be kept for
    // extents that stay, or what lies beyond the end would find none.
    site_end_ = packs.site(packs.moving(emptied, layout_.end).bytes, layout_.end, emptied, is_free).end;
    emptied_ = std::make_shared<const std::vector<bool>>(std::move(emptied));
}

/// Between two passes: how the packs are now, and what the ideal end is then. Not during one, or there would be a walk
/// for each FLUSH.
void Compact::refresh(const StopCheck &stop) {
    const Lock guard(mutex_);
    if (!prepared_)
        return;
    bool was_open = false;
    if (has_packs_ && packs_changed_) {
        was_open = repacker_.close();
        if (was_open)
            image_.give_back();
        measure_packs(survey_packs(state_, stop));
    }
    if (snapshots_changed_ && state_.snapshots.any())
        look_at_snapshots(stop);
    if (was_open && has_free_tail())
        gauges_.pending = static_cast<std::int64_t>(++layout_.pending);
}

// --- moves --------------------------------------------------------------------------------------------------------

bool Compact::to_repack(const Mapping &mapping, const Wanted &wanted) const {
    if (mapping.kind != Mapping::Kind::compressed)
        return false;
    const Geometry &g = state_.geometry;
    const auto extent = entry::compressed_extent(mapping.bits, g.cluster_bits());
    const HostCluster last = g.cluster_of(extent.at + (extent.bytes - 1));
    if (last >= wanted.end)
        return true;
    for (HostCluster c = g.cluster_of(extent.at); c <= last; ++c)
        if (wanted.emptied && c.value < wanted.emptied->size() && (*wanted.emptied)[c.value] && !repacker_.filled(c))
            return true;
    return false;
}

/// One compressed extent. False: there is no room for it.
bool Compact::repack(GuestCluster c, std::uint64_t descriptor, const Wanted &want) {
    const std::uint64_t bytes = entry::compressed_extent(descriptor, state_.geometry.cluster_bits()).bytes;
    auto share = room_for(bytes, want);
    const auto outcome = move_extent(c, descriptor, want);
    if (outcome == Repacker::Outcome::moved) {
        share.moved();
        gauges_.moved_bytes += bytes;
    }
    return outcome != Repacker::Outcome::no_room;
}

Repacker::Outcome Compact::move_extent(GuestCluster c, std::uint64_t descriptor, const Wanted &want) {
    const auto move = [&] { return repacker_.move(c, descriptor, {want.site_end, want.end}); };
    std::optional<Repacker::Outcome> outcome;
    try {
        outcome = move();
    } catch (const Error &error) {
        if (error.kind() != Error::Kind::no_space)
            throw;
    }
    if (!outcome) {
        image_.give_back(); // on a full disk, what was moved so far gives room
        outcome = move();
    }
    if (outcome == Repacker::Outcome::moved)
        placed_ += entry::compressed_extent(descriptor, state_.geometry.cluster_bits()).bytes;
    return *outcome;
}

void Compact::move_extents(const Work &work, const Wanted &want, const StopCheck &stop) {
    for (std::size_t i = 0; i < work.extents.size(); ++i) {
        require_going(stop);
        if (!repack(work.extents[i].first, work.extents[i].second, want))
            return found_no_room(std::span(work.extents).subspan(i));
    }
}

/// It was tried for the first of these, and not for the others.
void Compact::found_no_room(std::span<const std::pair<GuestCluster, std::uint64_t>> extents) {
    const std::uint64_t least = Packs::least_part(state_.geometry, most_referrers(state_));
    for (const auto &[c, descriptor] : extents)
        unplaced_ += std::max(entry::compressed_extent(descriptor, state_.geometry.cluster_bits()).bytes, least);
}

} // namespace qlean
