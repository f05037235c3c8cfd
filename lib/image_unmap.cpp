// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Trimming and zeroing: whole clusters become unallocated, parts of one are punched or zeroed in the host's file.
#include "cluster_io.h"
#include "error.h"
#include "image.h"

namespace qlean {

template <class Edge, class Middle>
void Image::split(GuestOffset at, std::uint64_t length, Edge &&edge, Middle &&middle) {
    const Geometry &g = state_.geometry;
    const GuestOffset end = at + length;
    const GuestOffset disk_end{g.virtual_size()};
    const GuestOffset first{round_up(at.value, g.cluster_size())};
    // The last cluster of the disk may stick out of it: what covers the rest of the disk covers it whole.
    const GuestOffset last = end == disk_end ? end : GuestOffset{round_down(end.value, g.cluster_size())};
    if (first >= last && !(first == at && end == disk_end)) {
        if (g.cluster_of(at) == g.cluster_of(end - 1)) {
            edge(at, length);
        } else {
            edge(at, first - at);
            edge(first, end - first);
        }
        return;
    }
    if (at < first)
        edge(at, first - at);
    for (GuestOffset from = first; from < last;) {
        const GuestOffset table_end = g.offset_of(state_.mapper.table_end(g.cluster_of(from)));
        const GuestOffset chunk_end = from + (unmap_chunk_bytes - from.value % unmap_chunk_bytes);
        if (!state_.mapper.has_table(g.cluster_of(from)) && !state_.raw_data &&
            state_.contents.ends_below(g.cluster_of(from))) {
            // Nothing there; a table that appears meanwhile is a write that comes after this request.
            from = std::min(last, table_end);
            continue;
        }
        const GuestOffset to = std::min({last, table_end, chunk_end});
        middle(from, to - from);
        from = to;
    }
    if (last < end)
        edge(last, end - last);
}

void Image::trim(GuestOffset at, std::uint64_t length) {
    if (length == 0)
        return;
    before_change(at, length);
    split(
        at, length, [&](GuestOffset from, std::uint64_t n) { trim_edge(from, n); },
        [&](GuestOffset from, std::uint64_t n) {
            before_change(from, n);
            unmap(from, n, Unmap::hint, false);
        });
}

void Image::zero(GuestOffset at, std::uint64_t length, Zero how, bool fast) {
    if (length == 0)
        return;
    before_change(at, length);
    split(
        at, length, [&](GuestOffset from, std::uint64_t n) { zero_edge(from, n, how, fast); },
        [&](GuestOffset from, std::uint64_t n) {
            before_change(from, n);
            if (state_.raw_data)
                zero_raw(from, n, how, fast);
            else if (how == Zero::may_trim)
                unmap(from, n, Unmap::promise, fast);
            else
                zero_keeping_space(from, n, fast);
        });
}

/// Whole clusters within one table give up what they hold. Where something lies below it must not show: they become
/// zero clusters. Version 2 has none: there each keeps its place, and is punched or zeroed within it.
void Image::unmap(GuestOffset at, std::uint64_t length, Unmap how, bool fast) {
    if (state_.raw_data) { // the file is the disk: it gives up the bytes, and the entries stay
        const RangeLock::Exclusive guard(state_.ranges, at, length);
        return state_.data.punch_if_possible(HostOffset{at.value}, length);
    }
    try {
        with_room([&](Allocator::Growth growth) { return unmap_chunk(at, length, how, growth); });
    } catch (const Error &error) {
        // Hiding what lies below may want a new table. A hint does not fail for that.
        if (how != Unmap::hint || error.kind() != Error::Kind::no_space)
            throw;
    }
    if (state_.mapper.format().version < 3 && !state_.contents.ends_below(state_.geometry.cluster_of(at)))
        each_cluster(state_.geometry, at, length,
                     [&](std::uint64_t done, GuestCluster, std::uint64_t, std::uint64_t n) {
                         if (how == Unmap::hint)
                             trim_edge(at + done, n);
                         else
                             zero_edge(at + done, n, Zero::may_trim, fast);
                     });
}

Image::Outcome Image::unmap_chunk(GuestOffset at, std::uint64_t length, Unmap how, Allocator::Growth growth) {
    const Geometry &g = state_.geometry;
    const GuestCluster first = g.cluster_of(at);
    const bool has_zeroes = state_.mapper.format().version >= 3;
    const bool needs_table = has_zeroes && !state_.contents.ends_below(first);
    const std::uint64_t count = (g.cluster_of(at + (length - 1)) - first) + 1;
    std::vector<HostRun> freed, external;
    const RangeLock::Exclusive guard(state_.ranges, at, length);
    // A guest that trims its free space must not fill the image with tables that hide nothing.
    if (needs_table && !state_.mapper.has_table(first) && state_.contents.zero_below(at, length))
        return Outcome::done;
    if (!state_.mapper.ensure_table(first, growth, needs_table ? Mapper::Missing::create : Mapper::Missing::leave))
        return Outcome::commit_first;
    {
        Mapper::Editor editor(state_.mapper, first, count);
        if (!editor.exists())
            return needs_table ? Outcome::commit_first : Outcome::done; // dropped meanwhile, for it was empty
        // Judged before anything is changed, so that a damaged entry leaves the chunk as it was.
        std::vector<Mapping> mappings(count);
        for (std::uint64_t i = 0; i < count; ++i)
            mappings[i] = how == Unmap::hint ? editor.peek(first + i) : editor.get(first + i);
        for (std::uint64_t i = 0; i < count; ++i) {
            const Mapping &m = mappings[i];
            if (m.kind == Mapping::Kind::damaged)
                continue;
            if (!m.has_host() && state_.contents.is_zero(first + i, m))
                continue;
            if (state_.contents.ends_below(first + i))
                editor.set_unallocated(first + i);
            else if (has_zeroes)
                editor.set_zero(first + i);
            else
                continue;
            state_.mapper.append_references(freed, m);
            state_.mapper.append_external(external, m);
        }
    }
    state_.allocator.retire(freed);
    // Nobody else can be given these bytes, and until the entry's end is durable they may read as zeroes.
    for (const HostRun &run : external)
        state_.data.punch_if_possible(g.offset_of(run.first), g.bytes(run.count));
    return Outcome::done;
}

/// Writes zeroes as a guest would, in pieces.
void Image::write_zeroes(GuestOffset at, std::uint64_t length) {
    const std::vector<std::byte> zeroes(std::min(length, data_chunk));
    for (std::uint64_t done = 0; done < length;) {
        const std::uint64_t n = std::min<std::uint64_t>(length - done, zeroes.size());
        write(std::span(zeroes).first(n), at + done);
        done += n;
    }
}

void Image::zero_keeping_space(GuestOffset at, std::uint64_t length, bool fast) {
    const Geometry &g = state_.geometry;
    if (g.has_subclusters())
        return with_room([&](Allocator::Growth growth) { return zero_subclusters_keeping_space(at, length, growth); });
    const GuestCluster first = g.cluster_of(at);
    std::vector<Mapping> mappings((g.cluster_of(at + (length - 1)) - first) + 1);
    std::vector<HostRun> runs;
    bool unshared = true;
    with_room([&](Allocator::Growth) { // of the host, for what has holes
        const RangeLock::Exclusive guard(state_.ranges, at, length);
        state_.mapper.resolve_to_change(first, mappings);
        runs.clear();
        unshared = true;
        for (const Mapping &m : mappings) {
            if (state_.contents.is_zero(first + (&m - mappings.data()), m))
                continue;
            if (!m.writable_in_place()) { // somebody else may own it too: let go of it instead of writing there
                unshared = false;
                break;
            }
            append_run(runs, {m.host, 1});
        }
        if (unshared)
            for (const HostRun &run : runs)
                zero_host(g.offset_of(run.first), g.bytes(run.count), Zero::keep_space, fast);
        return Outcome::done;
    });
    if (!unshared)
        unmap(at, length, Unmap::promise, fast);
}

/// Where the data file is the disk, zeroes are zeroes there too, whatever the entries say.
void Image::zero_raw(GuestOffset at, std::uint64_t length, Zero how, bool fast) {
    with_room([&](Allocator::Growth) {
        const RangeLock::Exclusive guard(state_.ranges, at, length);
        zero_host(HostOffset{at.value}, length, how, fast);
        return Outcome::done;
    });
}

void Image::zero_host(HostOffset at, std::uint64_t length, Zero how, bool fast) {
    if (how == Zero::may_trim && state_.data.punch(at, length))
        return;
    if (state_.data.zero_keeping_space(at, length) || state_.data.punch(at, length))
        return;
    if (fast)
        throw Error(Error::Kind::unsupported, EOPNOTSUPP,
                    fmt::format("the file system of '{}' has no fast way to zero", state_.file.name()));
    state_.data.write_zeroes(at, length);
}

/// Part of one cluster.
void Image::zero_edge(GuestOffset at, std::uint64_t length, Zero how, bool fast) {
    const Geometry &g = state_.geometry;
    if (state_.raw_data)
        return zero_raw(at, length, how, fast);
    if (g.has_subclusters())
        return zero_subclusters(at, length, how, fast);
    bool zeroed = true;
    with_room([&](Allocator::Growth) {
        const RangeLock::Exclusive guard(state_.ranges, at, length);
        Mapping m;
        state_.mapper.resolve_to_change(g.cluster_of(at), std::span(&m, 1));
        if (state_.contents.is_zero(g.cluster_of(at), m))
            return Outcome::done;
        zeroed = m.writable_in_place();
        if (zeroed)
            zero_host(g.offset_of(m.host) + g.within(at), length, how, fast);
        return Outcome::done;
    });
    if (zeroed)
        return;
    if (fast && length >= g.cluster_size())
        throw Error(Error::Kind::unsupported, EOPNOTSUPP,
                    fmt::format("version 2 of QCOW2, as '{}' is, has no fast way to zero what lies below an image",
                                state_.file.name()));
    // Shared with somebody, or it lies below: an ordinary write copies it.
    write_zeroes(at, length);
}

void Image::trim_edge(GuestOffset at, std::uint64_t length) {
    const Geometry &g = state_.geometry;
    if (g.has_subclusters() && !state_.raw_data)
        return trim_subclusters(at, length);
    // The end of the disk completes its last block: whoever counts what was trimmed (the filter) counts it.
    const GuestOffset end = at + length, first{round_up(at.value, host_block)};
    const GuestOffset last = end.value == g.virtual_size() ? end : GuestOffset{round_down(end.value, host_block)};
    if (first >= last)
        return;
    const RangeLock::Exclusive guard(state_.ranges, at, length);
    const Mapping m = state_.mapper.to_change(state_.mapper.look(g.cluster_of(at)));
    if ((!m.writable_in_place() && !(state_.raw_data && m.has_host())) || state_.mapper.claims_metadata(m))
        return;
    const HostOffset host = g.offset_of(m.host) + g.within(first);
    if (state_.data.holes_are_zeroes())
        return state_.data.punch_if_possible(host, last - first);
    // Encrypted: no space comes back, but what was trimmed piece by piece reads as zeroes, and can go as a whole.
    try {
        state_.data.write_zeroes(host, last - first);
    } catch (const Error &) {
        // A trim is a hint.
    }
}

} // namespace qlean
