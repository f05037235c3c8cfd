// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Guest writes: in place where the cluster is the guest's own, else account, write, then publish.
#include "cluster_io.h"
#include "error.h"
#include "image.h"
#include "subcluster_mapping.h"

#include <cstring>

namespace qlean {

void Image::write(std::span<const std::byte> from, GuestOffset at) {
    const Geometry &g = state_.geometry;
    while (!from.empty()) {
        const GuestOffset table_end = g.offset_of(state_.mapper.table_end(g.cluster_of(at)));
        const auto piece =
            from.first(std::min<std::uint64_t>({from.size(), data_chunk - at.value % data_chunk, table_end - at}));
        before_change(at, piece.size());
        const auto change = [&](Allocator::Growth growth) {
            if (write_in_place(piece, at))
                return Outcome::done;
            return g.has_subclusters() ? write_subclusters(piece, at, growth) : write_chunk(piece, at, growth);
        };
        with_room(std::ref(change)); // by reference, or each write would allocate memory
        from = from.subspan(piece.size());
        at += piece.size();
    }
}

/// Does `change`, committing to get room where there is none. No lock held.
void Image::with_room(const std::function<Outcome(Allocator::Growth)> &change) {
    auto growth = Allocator::Growth::after_commit;
    std::uint64_t covered = 0; // asked for where there was no room: each write passes here
    bool gave_back = false;
    for (int commits = 0;;) {
        bool full = false;
        try {
            if (change(growth) == Outcome::done)
                return;
        } catch (const Error &error) {
            if (error.kind() != Error::Kind::no_space || gave_back)
                throw;
            full = true;
        }
        // Other writers may take what a commit made room for: only commits that gain nothing count.
        if (const auto now = state_.allocator.covered_end(); now > covered) {
            covered = now;
            commits = 0;
        }
        if (++commits > WriteBack::max_commits_for_space)
            throw Error(Error::Kind::no_space, ENOSPC, fmt::format("'{}' cannot grow any further", state_.file.name()));
        growth = Allocator::Growth::now;
        if (full) {
            give_back();
            gave_back = true;
        } else {
            state_.write_back.commit(WriteBack::Give::back);
        }
    }
}

/// These bytes of the cluster are data already, in a host cluster that is the guest's own.
bool Image::is_own_data(const Mapping &m, std::uint64_t within, std::uint64_t length) const {
    if (m.writable_in_place())
        return true;
    return state_.geometry.has_subclusters() && m.owned() &&
           (subclusters::Grid(state_.geometry).touched(within, length) & ~subclusters::bitmap_of(m).data()) == 0;
}

/// Writes where all of it is the guest's own already; false, with nothing written, where something is not.
bool Image::write_in_place(std::span<const std::byte> from, GuestOffset at) {
    const Geometry &g = state_.geometry;
    const GuestCluster first = g.cluster_of(at);
    Mappings held((g.cluster_of(at + (from.size() - 1)) - first) + 1);
    const std::span<Mapping> mappings = held.all();
    const RangeLock::Shared guard(state_.ranges, at, from.size());
    state_.mapper.resolve_to_change(first, mappings);
    bool possible = true;
    each_cluster(g, at, from.size(), [&](std::uint64_t, GuestCluster c, std::uint64_t within, std::uint64_t n) {
        possible = possible && is_own_data(mappings[c - first], within, n);
    });
    if (!possible)
        return false;
    auto writes =
        joined<const std::byte>([&](std::span<const std::byte> bytes, HostOffset to) { state_.data.write(bytes, to); });
    each_cluster(g, at, from.size(), [&](std::uint64_t done, GuestCluster c, std::uint64_t within, std::uint64_t n) {
        writes.add(from.subspan(done, n), g.offset_of(mappings[c - first].host) + within);
    });
    writes.finish();
    return true;
}

/// In a data file a cluster's place is where the guest has it; nobody else writes there while its range is held.
Image::Place Image::place_in_data_file(GuestCluster c) {
    const HostCluster host{c.value};
    const auto data = state_.data.next_data(state_.geometry.offset_of(host));
    return {host, true, !data || *data >= state_.geometry.offset_of(host + 1)};
}

/// Where clusters that are written go: where they are if that is theirs alone, else to a new place, held by `reserved`.
/// Their table exists then. Nothing: commit first.
std::optional<std::vector<Image::Place>> Image::places_for(GuestCluster first, std::span<const Mapping> mappings,
                                                           Allocator::Growth growth, Allocator::Reservation &reserved) {
    const bool external = state_.mapper.format().external_data;
    std::uint64_t wanted = 0;
    for (const Mapping &m : mappings)
        wanted += !external && !m.owned();
    if (!state_.mapper.ensure_table(first, growth))
        return std::nullopt;
    if (wanted > 0) {
        reserved = state_.allocator.reserve(wanted, growth);
        if (reserved.empty())
            return std::nullopt;
    }
    std::vector<Place> places;
    places.reserve(mappings.size());
    auto extent = reserved.extents().begin();
    std::uint64_t used = 0;
    for (const Mapping &m : mappings) {
        if (m.owned()) {
            places.push_back({m.host, false, false});
            continue;
        }
        if (external) {
            places.push_back(place_in_data_file(first + places.size()));
            continue;
        }
        places.push_back({extent->run.first + used, true, extent->zero});
        if (++used == extent->run.count) {
            ++extent;
            used = 0;
        }
    }
    return places;
}

/// Changes within one L2 table, giving clusters to what has none of its own: account, write, then publish. `fill`
/// writes the data; `store` changes an entry, or leaves it.
Image::Outcome Image::write_placed(GuestOffset at, std::uint64_t length, Allocator::Growth growth, const Fill &fill,
                                   const Store &store) {
    const Geometry &g = state_.geometry;
    const GuestCluster first = g.cluster_of(at);
    std::vector<Mapping> mappings((g.cluster_of(at + (length - 1)) - first) + 1);
    const RangeLock::Exclusive guard(state_.ranges, at, length);
    state_.mapper.resolve_to_change(first, mappings);

    Allocator::Reservation reserved;
    const auto places = places_for(first, mappings, growth, reserved);
    if (!places)
        return Outcome::commit_first;
    fill(mappings, *places);

    std::vector<HostRun> replaced;
    {
        Mapper::Editor editor(state_.mapper, first, mappings.size());
        if (!editor.exists())
            return Outcome::commit_first; // the table was empty and has been given back meanwhile
        for (std::size_t i = 0; i < mappings.size(); ++i) {
            store(editor, first + i, mappings[i], (*places)[i]);
            if ((*places)[i].moves)
                state_.mapper.append_references(replaced, mappings[i]);
        }
    }
    reserved.publish();
    state_.allocator.retire(replaced);
    return Outcome::done;
}

/// Writes within one L2 table, where something is not the guest's own yet.
Image::Outcome Image::write_chunk(std::span<const std::byte> from, GuestOffset at, Allocator::Growth growth) {
    const Geometry &g = state_.geometry;
    const GuestCluster first = g.cluster_of(at);
    const bool fresh_is_zero = state_.data.holes_are_zeroes();
    const auto fill = [&](const std::vector<Mapping> &mappings, const std::vector<Place> &places) {
        auto writes = joined<const std::byte>(
            [&](std::span<const std::byte> bytes, HostOffset to) { state_.data.write(bytes, to); });
        std::vector<std::byte> whole;
        each_cluster(
            g, at, from.size(), [&](std::uint64_t done, GuestCluster c, std::uint64_t within, std::uint64_t n) {
                const Mapping &m = mappings[c - first];
                const Place &place = places[c - first];
                const HostOffset to = g.offset_of(place.host);
                const bool covers = n == g.cluster_size();
                const bool needs_old = !m.writable_in_place() && !state_.contents.is_zero(c, m);
                if (m.writable_in_place() || covers || (place.zero && fresh_is_zero && !needs_old)) {
                    writes.add(from.subspan(done, n), to + within);
                    return;
                }
                // The rest of the cluster has to be written as well: what the guest saw there before, or zeroes.
                writes.finish();
                whole.assign(g.cluster_size(), std::byte{0});
                if (needs_old && within > 0)
                    state_.contents.read(c, m, 0, std::span(whole).first(within));
                // What is below may be longer than this disk: nothing of that belongs to the last cluster.
                const std::uint64_t end = std::min(g.cluster_size(), g.virtual_size() - g.offset_of(c).value);
                if (needs_old && within + n < end)
                    state_.contents.read(c, m, within + n, std::span(whole).subspan(within + n, end - within - n));
                std::memcpy(whole.data() + within, from.data() + done, n);
                state_.data.write(whole, to);
            });
        writes.finish();
    };
    const auto store = [&](Mapper::Editor &editor, GuestCluster c, const Mapping &m, const Place &place) {
        if (!m.writable_in_place())
            editor.set_data(c, place.host);
    };
    return write_placed(at, from.size(), growth, std::ref(fill), std::ref(store));
}

} // namespace qlean
