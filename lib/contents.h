// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// What the guest sees in a cluster, wherever it comes from: the data file, a compressed extent, what lies below,
// zeroes. The one place that knows all of these; reading, copy-on-write and the search for zeroes ask here.
//
// The caller holds the cluster in the range lock (shared is enough), so that `mapping` stays true.
#pragma once

#include "backing.h"
#include "compressed_clusters.h"
#include "file.h"
#include "l2_entry.h"

#include <memory>
#include <span>

namespace qlean {

class Contents {
  public:
    /// `below`: what the image lies on; may be null.
    Contents(const Geometry &geometry, File &data, Backing *below, CompressedClusters &compressed)
        : geometry_(geometry), data_(data), below_(below), below_end_(below == nullptr ? 0 : below->size()),
          compressed_(compressed) {}

    /// What lies below the image, for clusters that are unallocated; null for nothing but zeroes.
    Backing *below() const { return below_; }
    /// Neither for this cluster nor for a later one is there anything below the image: unallocated is zeroes.
    bool ends_below(GuestCluster c) const { return geometry_.offset_of(c).value >= below_end_; }
    /// Nothing of the image's own is there, and what lies below has nothing there either; or it is zeroes by its entry.
    bool is_zero(GuestCluster c, const Mapping &mapping) const;
    /// What lies below these bytes is known to be zeroes without reading it.
    bool zero_below(GuestOffset at, std::uint64_t length) const;
    /// The entry might as well be unallocated: nothing is lost with it.
    bool is_nothing(GuestCluster c, const Mapping &mapping) const {
        using Kind = Mapping::Kind;
        return mapping.kind == Kind::unallocated ||
               (ends_below(c) && (mapping.kind == Kind::zero || mapping.kind == Kind::mixed));
    }
    /// Bytes [within, within + into.size()) of the cluster.
    void read(GuestCluster c, const Mapping &mapping, std::uint64_t within, std::span<std::byte> into);

  private:
    const Geometry geometry_;
    File &data_;
    Backing *below_;
    const std::uint64_t below_end_;
    CompressedClusters &compressed_;
};

} // namespace qlean
