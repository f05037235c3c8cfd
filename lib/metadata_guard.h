// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Host clusters that must never come free, whatever refcounts and entries say: those of the active image's own
// metadata (header, LUKS header, L1 and L2 tables, refcount table and blocks), and those that two entries claim
// (claims.h). An L2 entry that claims metadata for the guest is damage, and writing there would be the end of the
// image; so every entry that is decoded is held against this. A bit per cluster, without a lock for readers.
#pragma once

#include "address.h"
#include "sparse_bits.h"

namespace qlean {

class MetadataGuard {
  public:
    explicit MetadataGuard(unsigned cluster_bits)
        : cluster_bits_(cluster_bits), clusters_(std::uint64_t{1} << (host_offset_bits - cluster_bits)) {}

    bool has(HostCluster c) const { return clusters_.has(c.value); }
    /// False if it had one of them already.
    bool add(HostRun run) {
        bool all_new = true;
        for (HostCluster c = run.first; c < run.end(); ++c)
            all_new = !clusters_.set(c.value) && all_new;
        return all_new;
    }
    void remove(HostRun run) {
        for (HostCluster c = run.first; c < run.end(); ++c)
            clusters_.clear(c.value);
    }
    /// The same for whole structures of so many bytes.
    bool add(HostOffset at, std::uint64_t bytes) { return add(clusters(at, bytes)); }
    void remove(HostOffset at, std::uint64_t bytes) { remove(clusters(at, bytes)); }

  private:
    HostRun clusters(HostOffset at, std::uint64_t bytes) const {
        return {{at.value >> cluster_bits_}, divide_up(bytes, std::uint64_t{1} << cluster_bits_)};
    }

    const unsigned cluster_bits_;
    SparseBits clusters_;
};

} // namespace qlean
