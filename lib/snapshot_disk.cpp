// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "snapshot_disk.h"

#include "cluster_io.h"
#include "disk_view.h"

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
    ExtentList found(state_, most);
    each_piece(at, length, extent_chunk,
               [&](GuestOffset from, std::uint64_t n, GuestCluster first, const std::vector<Mapping> &mappings) {
                   each_cluster(state_.geometry, from, n,
                                [&](std::uint64_t, GuestCluster c, std::uint64_t within, std::uint64_t bytes) {
                                    found.add(c, mappings[c - first], within, bytes);
                                });
                   found.settle();
                   return !found.full();
               });
    return found.take();
}

void SnapshotDisk::prefetch(GuestOffset at, std::uint64_t length) {
    each_piece(at, length, data_chunk,
               [&](GuestOffset from, std::uint64_t n, GuestCluster first, const std::vector<Mapping> &mappings) {
                   prefetch_mapped(state_, first, mappings, from, n);
                   return true;
               });
}

} // namespace qlean
