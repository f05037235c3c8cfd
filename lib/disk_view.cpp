// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "disk_view.h"

#include "cluster_io.h"
#include "subcluster_mapping.h"

namespace qlean {

void ExtentList::append(GuestOffset from, std::uint64_t length, bool allocated, bool zero) {
    if (!found_.empty() && found_.back().allocated == allocated && found_.back().zero == zero)
        found_.back().length += length;
    else
        found_.push_back({from, length, allocated, zero});
}

void ExtentList::add(GuestCluster c, const Mapping &m, std::uint64_t within, std::uint64_t length) {
    subclusters::each_piece(state_.geometry, m, within, length,
                            [&](const Mapping &piece, std::uint64_t begin, std::uint64_t bytes) {
                                const GuestOffset from = state_.geometry.offset_of(c) + begin;
                                if (piece.kind == Mapping::Kind::unallocated && !state_.contents.ends_below(c)) {
                                    if (below_from_ == below_to_)
                                        below_from_ = from;
                                    below_to_ = from + bytes;
                                    return;
                                }
                                settle();
                                const bool allocated = piece.has_host() || piece.kind == Mapping::Kind::compressed;
                                append(from, bytes, allocated, state_.contents.is_zero(c, piece));
                            });
}

void ExtentList::add_unallocated(GuestOffset from, GuestOffset to) {
    if (state_.contents.ends_below(state_.geometry.cluster_of(from)))
        return append(from, to - from, false, true);
    below_from_ = from;
    below_to_ = to;
    settle();
}

void ExtentList::settle() {
    while (below_from_ < below_to_ && !full())
        for (const auto &e :
             state_.contents.below()->extents(below_from_, below_to_ - below_from_, most_ - found_.size() + 1)) {
            append(below_from_, e.length, e.allocated, e.zero);
            below_from_ += e.length;
        }
    below_from_ = below_to_;
}

std::vector<Image::Extent> ExtentList::take() {
    if (full())
        found_.resize(most_);
    return std::move(found_);
}

void prefetch_mapped(State &state, GuestCluster first, std::span<const Mapping> mappings, GuestOffset at,
                     std::uint64_t length) {
    const Geometry &g = state.geometry;
    each_cluster(g, at, length, [&](std::uint64_t, GuestCluster c, std::uint64_t within, std::uint64_t n) {
        const auto piece = [&](const Mapping &m, std::uint64_t from, std::uint64_t bytes) {
            if (m.kind == Mapping::Kind::data)
                state.data.will_need(g.offset_of(m.host) + from, bytes);
            if (m.kind == Mapping::Kind::compressed) {
                const auto extent = entry::compressed_extent(m.bits, g.cluster_bits());
                state.file.will_need(extent.at, extent.bytes);
            }
            if (m.kind == Mapping::Kind::unallocated && !state.contents.ends_below(c))
                state.contents.below()->prefetch(g.offset_of(c) + from, bytes);
        };
        subclusters::each_piece(g, mappings[c - first], within, n, piece);
    });
}

} // namespace qlean
