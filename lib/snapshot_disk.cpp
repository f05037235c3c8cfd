// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "snapshot_disk.h"

#include "cluster_io.h"
#include "subcluster_mapping.h"

namespace qlean {

namespace {

constexpr std::uint64_t data_chunk = 2 * 1024 * 1024;
constexpr std::uint64_t extent_chunk = 32 * 1024 * 1024;

} // namespace

/// f(at, length, first cluster, mappings) for pieces of up to `most` bytes, each held in the range lock; ends when f
/// says false.
template <class F>
void SnapshotDisk::each_piece(GuestOffset at, std::uint64_t length, std::uint64_t most, F &&f) {
    const Geometry &g = state_.geometry;
    const GuestOffset end = at + length;
    std::vector<Mapping> mappings;
    while (at < end) {
        const GuestOffset stop = std::min(end, at + (most - at.value % most));
        const GuestCluster first = g.cluster_of(at);
        mappings.resize((g.cluster_of(stop - 1) - first) + 1);
        const RangeLock::Shared guard(state_.ranges, at, stop - at);
        state_.mapper.survey(*use_, first, mappings);
        if (!f(at, stop - at, first, mappings))
            return;
        at = stop;
    }
}

void SnapshotDisk::read(std::span<std::byte> into, GuestOffset at) {
    const Geometry &g = state_.geometry;
    each_piece(at, into.size(), data_chunk,
               [&](GuestOffset from, std::uint64_t length, GuestCluster first, const std::vector<Mapping> &mappings) {
                   const auto piece = into.subspan(from - at, length);
                   auto reads = joined<std::byte>(
                       [&](std::span<std::byte> bytes, HostOffset host) { state_.data.read(bytes, host); });
                   each_cluster(g, from, length,
                                [&](std::uint64_t done, GuestCluster c, std::uint64_t within, std::uint64_t n) {
                                    const Mapping &m = mappings[c - first];
                                    if (m.kind == Mapping::Kind::data)
                                        reads.add(piece.subspan(done, n), g.offset_of(m.host) + within);
                                    else
                                        state_.contents.read(c, m, within, piece.subspan(done, n));
                                });
                   reads.finish();
                   return true;
               });
}

std::vector<Image::Extent> SnapshotDisk::extents(GuestOffset at, std::uint64_t length, std::size_t most) {
    const Geometry &g = state_.geometry;
    std::vector<Image::Extent> found;
    each_piece(
        at, length, extent_chunk,
        [&](GuestOffset from, std::uint64_t n, GuestCluster first, const std::vector<Mapping> &mappings) {
            each_cluster(g, from, n, [&](std::uint64_t, GuestCluster c, std::uint64_t within, std::uint64_t bytes) {
                const auto add = [&](const Mapping &m, std::uint64_t begin, std::uint64_t size) {
                    const bool allocated = m.has_host() || m.kind == Mapping::Kind::compressed;
                    const bool zero = state_.contents.is_zero(c, m);
                    if (!found.empty() && found.back().allocated == allocated && found.back().zero == zero)
                        found.back().length += size;
                    else
                        found.push_back({g.offset_of(c) + begin, size, allocated, zero});
                };
                subclusters::each_piece(g, mappings[c - first], within, bytes, add);
            });
            return found.size() <= most;
        });
    if (found.size() > most)
        found.resize(most);
    return found;
}

void SnapshotDisk::prefetch(GuestOffset at, std::uint64_t length) {
    const Geometry &g = state_.geometry;
    each_piece(at, length, data_chunk,
               [&](GuestOffset from, std::uint64_t n, GuestCluster first, const std::vector<Mapping> &mappings) {
                   each_cluster(g, from, n,
                                [&](std::uint64_t, GuestCluster c, std::uint64_t within, std::uint64_t bytes) {
                                    if (const Mapping &m = mappings[c - first]; m.kind == Mapping::Kind::data)
                                        state_.data.will_need(g.offset_of(m.host) + within, bytes);
                                });
                   return true;
               });
}

} // namespace qlean
