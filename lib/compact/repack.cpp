// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "repack.h"

#include "../compression.h"
#include "../refcount_block.h"
#include "referrers.h"

#include <cstring>
#include <memory>

namespace qlean {

namespace {

constexpr std::uint64_t stretch_bytes = 2 * 1024 * 1024;
constexpr std::uint64_t max_stretch_clusters = 32;
/// Stretches with too little room left for what came last: something smaller may come.
constexpr std::size_t max_stretches = 64;
/// What may be taken beyond the site until something came free there.
constexpr std::uint64_t max_grown_bytes = 32 * 1024 * 1024;
constexpr std::uint64_t min_grown_bytes = 1024 * 1024;
constexpr std::uint64_t min_grown_clusters = 4;
constexpr std::uint64_t grown_share = 64;

} // namespace

// --- where to -----------------------------------------------------------------------------------------------------

/// Where an extent can begin: not in a cluster whose refcount does not go that high.
HostOffset Repacker::next(const Stretch &stretch, std::uint64_t referrers) const {
    const Geometry &g = state_.geometry;
    return stretch.references + referrers <= RefcountView::max(g.refcount_order())
               ? stretch.at
               : g.offset_of(g.cluster_of(stretch.at) + 1);
}

/// Takes `bytes` from the front of the stretch, with their references.
Repacker::Place Repacker::take(Stretch &stretch, std::uint64_t bytes, std::uint64_t referrers) {
    const Geometry &g = state_.geometry;
    const std::uint64_t most = RefcountView::max(g.refcount_order());
    Place place{next(stretch, referrers), {}};
    if (place.at != stretch.at) {
        // Full as far as its refcount goes: the reference of the reservation is one too many there.
        const HostCluster left = stretch.clusters.take_first().run.first;
        state_.allocator.retire({{left, 1}});
        stretch.references = 0;
    }
    stretch.at = place.at;
    const HostOffset end = stretch.at + bytes;
    const HostCluster last = g.cluster_of(end - 1);
    for (HostCluster c = g.cluster_of(stretch.at); c <= last; ++c) {
        append_run(place.clusters, {c, 1});
        stretch.references += referrers;
        stretch.at = std::min(end, g.offset_of(c + 1));
        const bool full = stretch.at == g.offset_of(c + 1) || stretch.references == most;
        state_.allocator.add_references({c, 1}, full ? referrers - 1 : referrers);
        if (full) {
            // Nothing more goes in there: what reserved it is a reference of this extent now.
            stretch.clusters.take_first();
            stretch.at = g.offset_of(c + 1);
            stretch.references = 0;
        }
    }
    return place;
}

void Repacker::will_fill(HostCluster first, HostCluster end) {
    if (filled_.size() < end.value)
        filled_.resize(std::max(end.value, state_.allocator.end()));
    std::fill(filled_.begin() + static_cast<std::ptrdiff_t>(first.value),
              filled_.begin() + static_cast<std::ptrdiff_t>(end.value), true);
}

void Repacker::begin_stretch(Allocator::Reservation clusters) {
    const Geometry &g = state_.geometry;
    const HostCluster first = clusters.extents().front().run.first;
    const HostCluster end = first + clusters.count();
    will_fill(first, end);
    if (stretches_.size() == max_stretches) {
        const auto least =
            std::min_element(stretches_.begin(), stretches_.end(),
                             [](const Stretch &a, const Stretch &b) { return a.end - a.at < b.end - b.at; });
        stretches_.erase(least);
    }
    stretches_.push_back({std::move(clusters), g.offset_of(first), g.offset_of(end), 0});
}

/// A stretch goes on where what follows it has come free: less is lost than with a new one. False: none can go on so
/// far that `bytes` fit.
bool Repacker::extend_stretch(std::uint64_t bytes, std::uint64_t referrers, const Site &site) {
    const Geometry &g = state_.geometry;
    for (Stretch &s : stretches_) {
        const HostCluster first = g.cluster_of(s.end);
        const HostCluster end = g.cluster_of(next(s, referrers) + bytes - 1) + 1;
        if (end > site.end)
            continue;
        auto more = state_.allocator.reserve_contiguous_below(end - first, end, first, Allocator::Embargo::respected);
        if (more.empty())
            continue;
        will_fill(first, end);
        s.clusters.append(std::move(more));
        s.end = g.offset_of(end);
        return true;
    }
    return false;
}

/// At least, and if there are so many in a row, at most so many clusters.
bool Repacker::open_below(HostCluster limit, std::uint64_t least, std::uint64_t most) {
    for (std::uint64_t n = most;; n = std::max(n / 2, least)) {
        if (auto room = state_.allocator.reserve_contiguous_below(n, limit, {0}, Allocator::Embargo::respected);
            !room.empty()) {
            begin_stretch(std::move(room));
            return true;
        }
        if (n == least)
            return false;
    }
}

/// False: there is no room for `bytes`.
bool Repacker::open_stretch(std::uint64_t bytes, const Site &site) {
    const Geometry &g = state_.geometry;
    const std::uint64_t least = g.clusters_for(bytes);
    const std::uint64_t most =
        std::max(least, std::clamp<std::uint64_t>(stretch_bytes >> g.cluster_bits(), 1, max_stretch_clusters));
    if (open_below(site.end, least, most))
        return true;
    // What was emptied so far makes room once that is durable.
    if (state_.allocator.retired_bytes() != 0) {
        image_.give_back();
        if (open_below(site.end, least, most))
            return true;
    }
    // Nothing is free there yet, as in an image of nothing but packs with holes: some room to begin with.
    const std::uint64_t may_grow =
        std::max({std::min(max_grown_bytes >> g.cluster_bits(), state_.allocator.end() / grown_share),
                  min_grown_bytes >> g.cluster_bits(), min_grown_clusters});
    if (grown_ >= may_grow || state_.allocator.free_below(site.limit) != 0)
        return open_below(site.limit, least, most);
    const std::uint64_t wanted = std::min(most, std::max(may_grow - grown_, least));
    auto room = state_.allocator.reserve(wanted, Allocator::Growth::now);
    if (room.empty()) { // refcounts for more have to be linked first
        image_.give_back();
        room = state_.allocator.reserve(wanted, Allocator::Growth::now);
    }
    bool fits = false;
    while (!room.empty()) {
        auto adjacent = room.take_adjacent();
        if (adjacent.count() < least)
            continue;
        grown_ += adjacent.count();
        begin_stretch(std::move(adjacent));
        fits = true;
    }
    return fits;
}

std::optional<Repacker::Place> Repacker::place(std::uint64_t bytes, std::uint64_t referrers, const Site &site) {
    const Lock guard(mutex_);
    const auto room = [&](const Stretch &s) {
        const HostOffset at = next(s, referrers);
        return at < s.end ? s.end - at : 0;
    };
    for (;;) {
        Stretch *best = nullptr;
        for (Stretch &s : stretches_)
            if (room(s) >= bytes && (best == nullptr || room(s) < room(*best)))
                best = &s;
        if (best != nullptr) {
            Place place = take(*best, bytes, referrers);
            if (best->at == best->end)
                stretches_.erase(stretches_.begin() + (best - stretches_.data()));
            return place;
        }
        if (!extend_stretch(bytes, referrers, site) && !open_stretch(bytes, site))
            return std::nullopt;
    }
}

bool Repacker::filled(HostCluster c) const {
    const Lock guard(mutex_);
    return c.value < filled_.size() && filled_[c.value];
}

bool Repacker::close() {
    const Lock guard(mutex_);
    grown_ = 0;
    return !std::exchange(stretches_, {}).empty();
}

// --- one move -----------------------------------------------------------------------------------------------------

Repacker::Outcome Repacker::move(GuestCluster c, std::uint64_t descriptor, const Site &site) {
    const Geometry &g = state_.geometry;
    const auto is_it = [&](const Mapping &m) { return m.kind == Mapping::Kind::compressed && m.bits == descriptor; };
    warm_referrers(state_, c);
    const auto before = find_referrers(state_, c, is_it);
    if (!before || before->count() == 0)
        return Outcome::gone;
    const std::uint64_t count = before->count();
    if (count > RefcountView::max(g.refcount_order()))
        return Outcome::gone; // an image of which a refcount lies
    const CompressedExtent extent = entry::compressed_extent(descriptor, g.cluster_bits());
    const auto memory = std::make_unique_for_overwrite<std::byte[]>(2 * extent.bytes + g.cluster_size());
    const std::span bytes(memory.get(), extent.bytes), again(memory.get() + extent.bytes, extent.bytes);
    const std::span cluster(memory.get() + 2 * extent.bytes, g.cluster_size());
    state_.file.read(bytes, extent.at);
    // Its exact length. What does not decompress is none of our business: it is moved with all that may be part of it.
    const std::uint64_t length =
        compression::decompress(state_.compressed.type(), bytes, cluster).length.value_or(extent.bytes);

    const auto to = place(length, count, site);
    if (!to)
        return Outcome::no_room;
    struct Undo {
        Allocator &allocator;
        const std::vector<HostRun> &clusters;
        std::uint64_t count;
        bool armed = true;
        ~Undo() {
            for (std::uint64_t i = 0; i < count && armed; ++i)
                allocator.retire(clusters);
        }
    } undo{state_.allocator, to->clusters, count};
    const auto moved = compression::describe(to->at, length, g.cluster_bits());
    if (!moved)
        return Outcome::gone; // it does not decompress, and is too long to begin anywhere but where it is

    const RangeLock::Exclusive guard(state_.ranges, g.offset_of(c), 1, std::try_to_lock);
    if (!guard.owns())
        return Outcome::contended;
    const auto referrers = find_referrers(state_, c, is_it);
    if (!referrers || referrers->count() == 0)
        return Outcome::gone;
    if (referrers->count() != count)
        return Outcome::contended;
    // Read again, from memory: what was read without the lock might have been somebody else's by then.
    state_.file.read(again, extent.at);
    if (std::memcmp(bytes.data(), again.data(), length) != 0)
        return Outcome::contended;
    state_.file.write(bytes.first(length), to->at);
    change_all(
        state_, c, *referrers, [&](std::uint64_t) { return *moved | entry::compressed; }, [&] { undo.armed = false; });
    state_.allocator.touch(to->clusters); // no walk that began after they were taken can tell what refers to them
    Mapping old;
    old.kind = Mapping::Kind::compressed;
    old.bits = descriptor;
    std::vector<HostRun> given_up;
    for (std::uint64_t i = 0; i < count; ++i)
        state_.mapper.append_references(given_up, old);
    state_.allocator.retire(given_up); // within the range: a walk that waits for it finds both done or neither
    return Outcome::moved;
}

} // namespace qlean
