// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "claims.h"

namespace qlean {

namespace {

std::uint64_t host_clusters(const Geometry &g) { return std::uint64_t{1} << (host_offset_bits - g.cluster_bits()); }

} // namespace

Claims::Claims(const Geometry &geometry, const EntryFormat &format, std::uint64_t slices, std::uint64_t end,
               MetadataGuard &guard)
    : geometry_(geometry), format_(format), end_(end), guard_(guard), known_(slices), data_(host_clusters(geometry)),
      extents_(host_clusters(geometry)), structures_(host_clusters(geometry)), twice_(host_clusters(geometry)) {}

void Claims::found_twice(HostCluster c) {
    // Of metadata the guard knows already, and such an entry is not to be used at all.
    if (guard_.has(c) && !twice_.has(c.value))
        return;
    twice_.set(c.value);
    guard_.add({c, 1});
}

void Claims::taken(HostRun run) {
    for (HostCluster c = run.first; c < run.end(); ++c) {
        structures_.set(c.value);
        if (data_.has(c.value))
            found_twice(c);
    }
}

void Claims::read(std::uint64_t slice, std::span<const std::uint64_t> words) {
    if (format_.external_data || known_.set(slice))
        return;
    const std::uint64_t step = geometry_.entry_words();
    for (std::size_t i = 0; i < words.size(); i += step) {
        const Mapping m = entry::decode({words[i], step == 2 ? words[i + 1] : 0}, format_);
        if (m.has_host()) {
            if (m.host.value >= end_)
                continue;
            const bool before = data_.set(m.host.value);
            if (before || extents_.has(m.host.value) || structures_.has(m.host.value))
                found_twice(m.host);
        } else if (m.kind == Mapping::Kind::compressed) {
            const auto extent = entry::compressed_extent(m.bits, geometry_.cluster_bits());
            const HostCluster last = geometry_.cluster_of(extent.at + (extent.bytes - 1));
            for (HostCluster c = geometry_.cluster_of(extent.at); c <= last && c.value < end_; ++c) {
                extents_.set(c.value);
                if (data_.has(c.value))
                    found_twice(c);
            }
        }
    }
}

} // namespace qlean
