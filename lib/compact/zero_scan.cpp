// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "zero_scan.h"

#include "../subcluster_change.h"
#include "zero_bytes.h"

namespace qlean {

namespace {

constexpr std::uint64_t scanned_at_a_time = 4096;
constexpr std::uint64_t first_look = 4096; // bytes; a page of the host's

} // namespace

ZeroScan::ZeroScan(Image &image, Gauges &gauges)
    : image_(image), state_(image.state()), gauges_(gauges), known_(state_.geometry.guest_clusters()) {}

ZeroScan::~ZeroScan() {
    try {
        if (changed_)
            image_.give_back();
    } catch (...) {
        // The background commit tries again and reports.
    }
}

bool ZeroScan::wanted(GuestCluster c, const Mapping &mapping) const {
    // In version 2 nothing but data can hide what lies below: there even zeroes have to stay.
    const bool may_go = state_.mapper.format().version >= 3 || state_.contents.ends_below(c);
    return may_be_zero(mapping) && may_go && !known_.has(c.value);
}

std::vector<Maintenance::Planned> ZeroScan::plan(GuestOffset at, std::uint64_t length, std::size_t most,
                                                 const StopCheck &stop_check) {
    const Geometry &g = state_.geometry;
    std::vector<Planned> planned;
    std::vector<Mapping> mappings;
    const GuestOffset end = at + length;
    while (at < end && planned.size() <= most) {
        require_going(stop_check);
        const GuestCluster first = g.cluster_of(at);
        GuestOffset stop = std::min(end, g.offset_of(state_.mapper.table_end(first)));
        if (!state_.mapper.has_table(first)) {
            append_planned(planned, at, stop - at, false);
        } else {
            stop = std::min(stop, g.offset_of(first + scanned_at_a_time));
            mappings.resize((g.cluster_of(stop - 1) - first) + 1);
            state_.mapper.survey(first, mappings);
            for (std::size_t i = 0; i < mappings.size(); ++i) {
                const GuestOffset from = std::max(at, g.offset_of(first + i));
                const GuestOffset to = std::min(stop, g.offset_of(first + i + 1));
                append_planned(planned, from, to - from, wanted(first + i, mappings[i]));
            }
        }
        at = stop;
    }
    if (planned.size() > most)
        planned.resize(most);
    return planned;
}

void ZeroScan::run(GuestOffset at, std::uint64_t length, const StopCheck &stop) {
    const Geometry &g = state_.geometry;
    state_.write_back.before_change();
    const GuestCluster last = g.cluster_of(at + (length - 1));
    std::vector<Mapping> mappings;
    for (GuestCluster c = g.cluster_of(at); c <= last;) {
        if (!state_.mapper.has_table(c)) {
            c = state_.mapper.table_end(c);
            continue;
        }
        const GuestCluster end = std::min({last + 1, state_.mapper.table_end(c), c + scanned_at_a_time});
        mappings.resize(end - c);
        state_.mapper.survey(c, mappings);
        for (std::size_t i = 0; i < mappings.size(); ++i) {
            if (!wanted(c + i, mappings[i]))
                continue;
            require_going(stop);
            if (!look_at(c + i, mappings[i])) {
                image_.give_back();
                look_at(c + i, mappings[i]);
            }
        }
        c = end;
    }
}

/// Worth a look. No compressor makes more than this of zeroes, so most compressed clusters need not be decompressed.
bool ZeroScan::may_be_zero(const Mapping &mapping) const {
    const Geometry &g = state_.geometry;
    if (mapping.kind == Mapping::Kind::compressed)
        return entry::compressed_extent(mapping.bits, g.cluster_bits()).bytes <= g.cluster_size() / 64 + 1024;
    return mapping.has_host();
}

bool ZeroScan::holds_zeroes(GuestCluster c, const Mapping &mapping, std::vector<std::byte> &bytes) {
    if (state_.contents.is_zero(c, mapping))
        return true;
    const std::uint64_t size = state_.geometry.cluster_size();
    try {
        if (mapping.has_host() && size > first_look) { // most show at once that they hold something
            bytes.resize(first_look);
            state_.contents.read(c, mapping, 0, bytes);
            gauges_.zero_read_bytes += bytes.size();
            if (!all_zero(bytes))
                return false;
        }
        bytes.resize(size);
        state_.contents.read(c, mapping, 0, bytes);
    } catch (const Error &error) {
        if (mapping.kind != Mapping::Kind::compressed || error.kind() != Error::Kind::bad_image)
            throw;
        return false; // what does not decompress is not zeroes
    }
    gauges_.zero_read_bytes += bytes.size();
    return all_zero(bytes);
}

bool ZeroScan::look_at(GuestCluster c, const Mapping &seen) {
    const Geometry &g = state_.geometry;
    if (g.has_subclusters() && seen.has_host())
        return look_at_subclusters(c, seen.host);
    std::vector<std::byte> bytes;
    // Unlocked: a first look, which also brings what is zeroes into memory. A hole in the file needs no reading.
    const HostOffset from = g.offset_of(seen.host);
    const auto data = seen.has_host() ? state_.data.next_data(from) : std::nullopt;
    const bool is_hole = seen.has_host() && !(data && *data < from + g.cluster_size());
    if (!is_hole && !holds_zeroes(c, seen, bytes)) {
        known_.set(c.value);
        return true;
    }
    (void)state_.mapper.look(c); // the slice is in memory when the lock is held
    const RangeLock::Exclusive guard(state_.ranges, g.offset_of(c), 1, std::try_to_lock);
    if (!guard.owns())
        return true; // the guest is at it: look again later
    Mapping m;
    state_.mapper.resolve(c, std::span(&m, 1));
    if (m != seen)
        return true;
    if (!holds_zeroes(c, m, bytes)) {
        known_.set(c.value);
        return true;
    }
    if (!state_.mapper.ensure_table(c, Allocator::Growth::now))
        return false;
    if (state_.mapper.format().external_data) {
        if (!is_hole)
            gauges_.zero_freed_bytes += g.cluster_size();
        state_.data.punch_if_possible(from, g.cluster_size());
        if (state_.raw_data) {
            known_.set(c.value); // the entry stays: it says that the data file is the disk
            return true;
        }
    } else {
        gauges_.zero_freed_bytes += g.cluster_size();
    }
    std::vector<HostRun> freed;
    state_.mapper.append_references(freed, m);
    {
        Mapper::Editor editor(state_.mapper, c, 1);
        if (state_.contents.ends_below(c))
            editor.set_unallocated(c);
        else
            editor.set_zero(c);
    }
    state_.allocator.retire(freed);
    changed_ = true;
    return true;
}

/// Of the subclusters with data, those that hold nothing but zeroes.
subclusters::Set ZeroScan::zero_subclusters(GuestCluster c, const Mapping &mapping) {
    const subclusters::Grid grid(state_.geometry);
    subclusters::Set found = 0;
    std::vector<std::byte> bytes;
    grid.each_run(subclusters::bitmap_of(mapping).data(), [&](std::uint64_t begin, std::uint64_t length) {
        bytes.resize(length);
        state_.contents.read(c, mapping, begin, bytes);
        gauges_.zero_read_bytes += length;
        for (std::uint64_t at = 0; at < length; at += grid.size())
            if (all_zero(std::span(bytes).subspan(at, grid.size())))
                found |= grid.touched(begin + at, 1);
    });
    return found;
}

bool ZeroScan::look_at_subclusters(GuestCluster c, HostCluster host) {
    using namespace subclusters;
    const Geometry &g = state_.geometry;
    const auto nothing_to_do = [&](const Mapping &m) {
        return bitmap_of(m).data() != 0 && zero_subclusters(c, m) == 0;
    };
    Mapping m = state_.mapper.look(c);
    if (!m.has_host() || m.host != host)
        return true;
    // Unlocked: a first look, which also brings the cluster into memory.
    if (nothing_to_do(m)) {
        known_.set(c.value);
        return true;
    }
    const RangeLock::Exclusive guard(state_.ranges, g.offset_of(c), 1, std::try_to_lock);
    if (!guard.owns())
        return true; // the guest is at it: look again later
    state_.mapper.resolve_to_change(c, std::span(&m, 1));
    if (!m.has_host() || m.host != host)
        return true;
    const Set gone = zero_subclusters(c, m);
    if (gone == 0 && bitmap_of(m).data() != 0) {
        known_.set(c.value);
        return true;
    }
    if (state_.raw_data) { // the entry stays: it says that the data file is the disk
        punch_all_but(state_, host, bitmap_of(m).data() & ~gone);
        known_.set(c.value);
        return true;
    }
    if (!state_.mapper.ensure_table(c, Allocator::Growth::now))
        return false;
    const Bitmap after = bitmap_of(m).with(gone, state_.contents.ends_below(c) ? Kind::unallocated : Kind::zero);
    std::vector<HostRun> freed;
    bool has_host;
    {
        Mapper::Editor editor(state_.mapper, c, 1);
        has_host = set_subclusters(state_, editor, c, m, after, false, freed);
    }
    state_.allocator.retire(freed);
    if (!has_host && state_.mapper.is_external(m))
        state_.data.punch_if_possible(g.offset_of(host), g.cluster_size());
    if (has_host) {
        known_.set(c.value);
        if (m.copied)
            punch_all_but(state_, host, after.data());
    }
    const Grid grid(g);
    gauges_.zero_freed_bytes += has_host ? grid.bytes(static_cast<unsigned>(std::popcount(gone))) : g.cluster_size();
    changed_ = true;
    return true;
}

void ZeroScan::commit(const StopCheck &) {
    changed_ = false;
    image_.give_back();
}

} // namespace qlean
