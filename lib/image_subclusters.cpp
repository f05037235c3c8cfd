// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The guest's changes to images with extended L2 entries: what happens to less than a cluster happens to subclusters.
//
// Invariant: the bytes of a subcluster are in the data file before its bit says so, and what lies there while the bit
// says otherwise is never read. So a host cluster may be taken without writing all of it, and the bytes of a subcluster
// that was given up may be punched at once: if a crash brings the old bit back, it reads as zeroes, which the guest
// asked for.
#include "cluster_io.h"
#include "error.h"
#include "image.h"
#include "subcluster_change.h"

#include <cstring>

namespace qlean {

using namespace subclusters;

namespace {} // namespace

/// Writes within one L2 table: what is touched becomes data, in the cluster's own host cluster or in a new one, which
/// takes along what the old one held.
Image::Outcome Image::write_subclusters(std::span<const std::byte> from, GuestOffset at, Allocator::Growth growth) {
    const Geometry &g = state_.geometry;
    const GuestCluster first = g.cluster_of(at);
    std::vector<Bitmap> bitmaps;
    const auto fill = [&](const std::vector<Mapping> &mappings, const std::vector<Place> &places) {
        each_cluster(g, at, from.size(),
                     [&](std::uint64_t done, GuestCluster c, std::uint64_t within, std::uint64_t n) {
                         bitmaps.push_back(fill_subclusters(c, mappings[c - first], places[c - first], within,
                                                            from.subspan(done, n)));
                     });
    };
    const auto store = [&](Mapper::Editor &editor, GuestCluster c, const Mapping &, const Place &place) {
        const L2Words words{entry::data(g.offset_of(place.host)), bitmaps[c - first].word()};
        if (editor.words(c) != words)
            editor.set_words(c, words);
    };
    return write_placed(at, from.size(), growth, std::ref(fill), std::ref(store));
}

/// Writes the guest's bytes to where the cluster lies from now on, with what else of it has to be there. Gives the
/// bitmap in which what was written is data.
Bitmap Image::fill_subclusters(GuestCluster c, const Mapping &m, const Place &place, std::uint64_t within,
                               std::span<const std::byte> bytes) {
    const Geometry &g = state_.geometry;
    const Grid grid(g);
    const HostOffset host = g.offset_of(place.host);
    const std::uint64_t stop = within + bytes.size();
    const Set touched = grid.touched(within, bytes.size());
    const auto first = static_cast<unsigned>(std::countr_zero(touched));
    const auto last = count - 1 - static_cast<unsigned>(std::countl_zero(touched));
    const Bitmap before = bitmap_of(m), after = before.with(touched, Kind::data);
    // What the guest does not write of a subcluster is there already.
    const auto is_right = [&](unsigned i) {
        if (!place.moves)
            return before[i] == Kind::data;
        return place.zero && state_.data.holes_are_zeroes() && state_.contents.is_zero(c, uniform(m, before[i]));
    };
    std::vector<std::byte> whole;
    grid.each_run(touched | (place.moves ? before.data() : 0), [&](std::uint64_t begin, std::uint64_t length) {
        std::uint64_t end = begin + length;
        if (begin == grid.bytes(first) && is_right(first))
            begin = within;
        if (end == grid.bytes(last + 1) && is_right(last))
            end = stop;
        if (begin >= within && end <= stop)
            return state_.data.write(bytes.subspan(begin - within, end - begin), host + begin);
        whole.assign(end - begin, std::byte{0});
        const auto keep = [&](std::uint64_t from, std::uint64_t to) {
            // What is below may be longer than this disk: nothing of that belongs to the last cluster.
            to = std::min(to, g.virtual_size() - g.offset_of(c).value);
            if (from < to)
                state_.contents.read(c, m, from, std::span(whole).subspan(from - begin, to - from));
        };
        keep(begin, std::min(end, within));
        keep(std::max(begin, stop), end);
        if (const std::uint64_t from = std::max(begin, within), to = std::min(end, stop); from < to)
            std::memcpy(whole.data() + (from - begin), bytes.data() + (from - within), to - from);
        state_.data.write(whole, host + begin);
    });
    if (place.moves && !place.zero && !state_.raw_data)
        punch_all_but(state_, place.host, after.data());
    return after;
}

/// Whole clusters within one table read as zeroes, and keep their host clusters where these are theirs.
Image::Outcome Image::zero_subclusters_keeping_space(GuestOffset at, std::uint64_t length, Allocator::Growth growth) {
    const Geometry &g = state_.geometry;
    const GuestCluster first = g.cluster_of(at);
    const bool needs_table = !state_.contents.ends_below(first);
    const std::uint64_t count = (g.cluster_of(at + (length - 1)) - first) + 1;
    std::vector<HostRun> freed;
    const RangeLock::Exclusive guard(state_.ranges, at, length);
    if (!state_.mapper.ensure_table(first, growth, needs_table ? Mapper::Missing::create : Mapper::Missing::leave))
        return Outcome::commit_first;
    {
        Mapper::Editor editor(state_.mapper, first, count);
        if (!editor.exists())
            return needs_table ? Outcome::commit_first : Outcome::done;
        std::vector<Mapping> mappings(count);
        for (std::uint64_t i = 0; i < count; ++i)
            mappings[i] = editor.get(first + i); // judged before anything is changed
        for (std::uint64_t i = 0; i < count; ++i)
            if (const Mapping &m = mappings[i]; !state_.contents.is_zero(first + i, m))
                set_subclusters(state_, editor, first + i, m, all_zero, m.owned(), freed);
    }
    state_.allocator.retire(freed);
    return Outcome::done;
}

/// Part of one cluster reads as zeroes.
void Image::zero_subclusters(GuestOffset at, std::uint64_t length, Zero how, bool fast) {
    std::vector<Piece> to_write;
    with_room([&](Allocator::Growth growth) { return zero_subclusters_in(at, length, how, fast, growth, to_write); });
    const GuestOffset cluster = state_.geometry.offset_of(state_.geometry.cluster_of(at));
    for (const Piece &piece : to_write)
        write_zeroes(cluster + piece.within, piece.length);
}

/// Does what needs no data to be written; the rest goes to `to_write`.
Image::Outcome Image::zero_subclusters_in(GuestOffset at, std::uint64_t length, Zero how, bool fast,
                                          Allocator::Growth growth, std::vector<Piece> &to_write) {
    const Geometry &g = state_.geometry;
    const Grid grid(g);
    const GuestCluster c = g.cluster_of(at);
    const bool needs_table = !state_.contents.ends_below(c);
    const std::uint64_t within = g.within(at);
    to_write.clear();
    const RangeLock::Exclusive guard(state_.ranges, at, length);
    Mapping m;
    state_.mapper.resolve_to_change(c, std::span(&m, 1));
    if (state_.contents.is_zero(c, m))
        return Outcome::done;
    if (!state_.mapper.ensure_table(c, growth, needs_table ? Mapper::Missing::create : Mapper::Missing::leave))
        return Outcome::commit_first;
    if (m.kind == Mapping::Kind::compressed) {
        to_write.push_back({within, length});
        return Outcome::done;
    }
    const Bitmap before = bitmap_of(m);
    const Set covered = grid.covered(within, covering_length(at, length));
    const auto is_zero = [&](Kind kind) { return state_.contents.is_zero(c, uniform(m, kind)); };
    // Subclusters of which a part stays.
    grid.each_run(grid.touched(within, length) & ~covered, [&](std::uint64_t from, std::uint64_t n) {
        const std::uint64_t begin = std::max(from, within), end = std::min(from + n, within + length);
        grid.each_run(before, begin, end - begin, [&](Kind kind, std::uint64_t piece, std::uint64_t bytes) {
            if (is_zero(kind))
                return;
            if (kind == Kind::data && m.owned())
                zero_host(g.offset_of(m.host) + piece, bytes, how, fast);
            else
                to_write.push_back({piece, bytes});
        });
    });
    Set gone = covered & ~before.zero();
    if (is_zero(Kind::unallocated))
        gone &= ~before.unallocated();
    if (gone == 0)
        return Outcome::done;
    return give_up_subclusters(c, m, gone, how == Zero::keep_space && m.owned(),
                               how == Zero::may_trim ? grid.span(covered) : Piece{});
}

/// Part of one cluster is given up: whole subclusters for good, parts of one are punched.
void Image::trim_subclusters(GuestOffset at, std::uint64_t length) {
    const Geometry &g = state_.geometry;
    const Grid grid(g);
    const GuestCluster c = g.cluster_of(at);
    const std::uint64_t within = g.within(at), covering = covering_length(at, length);
    const auto change = [&](Allocator::Growth growth) {
        const RangeLock::Exclusive guard(state_.ranges, at, length);
        const Mapping m = state_.mapper.to_change(state_.mapper.look(c));
        if (!m.has_host() || state_.mapper.claims_metadata(m))
            return Outcome::done;
        const Set gone = grid.covered(within, covering) & bitmap_of(m).data();
        if (gone != 0 && !state_.mapper.ensure_table(c, growth, Mapper::Missing::leave))
            return Outcome::commit_first;
        return give_up_subclusters(c, m, gone, false, {within, covering});
    };
    try {
        with_room(change);
    } catch (const Error &error) {
        // It may want a table of its own. A hint does not fail for that.
        if (error.kind() != Error::Kind::no_space)
            throw;
    }
}

/// The subclusters `gone` of a cluster that has a bitmap become zeroes, and the host gets back what it can around
/// `trimmed`. With the cluster held exclusively.
Image::Outcome Image::give_up_subclusters(GuestCluster c, const Mapping &m, Set gone, bool keep_host, Piece trimmed) {
    const Geometry &g = state_.geometry;
    const Bitmap after = bitmap_of(m).with(gone, state_.contents.ends_below(c) ? Kind::unallocated : Kind::zero);
    std::vector<HostRun> freed;
    bool has_host = m.has_host();
    if (gone != 0) {
        Mapper::Editor editor(state_.mapper, c, 1);
        if (!editor.exists())
            return Outcome::commit_first;
        has_host = set_subclusters(state_, editor, c, m, after, keep_host, freed);
    }
    state_.allocator.retire(freed);
    if (!has_host && state_.mapper.is_external(m))
        state_.data.punch_if_possible(g.offset_of(m.host), g.cluster_size());
    if (has_host && m.copied && trimmed.length != 0) {
        const Piece piece = returnable(Grid(g), after.data(), trimmed.within, trimmed.length, host_block);
        if (piece.length != 0)
            state_.data.punch_if_possible(g.offset_of(m.host) + piece.within, piece.length);
    }
    return Outcome::done;
}

/// What covers the rest of the disk covers the rest of its last cluster.
std::uint64_t Image::covering_length(GuestOffset at, std::uint64_t length) const {
    const Geometry &g = state_.geometry;
    return (at + length).value == g.virtual_size() ? g.cluster_size() - g.within(at) : length;
}

} // namespace qlean
