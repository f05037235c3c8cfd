// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Finds allocated clusters that hold nothing but zeroes and gives them back; so with subclusters, where there are such.
// The plan is every allocated cluster not yet known to hold something; a pass over it leaves it empty. Moves nothing,
// so it needs no ownership.
#pragma once

#include "../sparse_bits.h"
#include "../subclusters.h"
#include "maintenance.h"
#include "survey.h"

namespace qlean {

class ZeroScan final : public Maintenance {
  public:
    ZeroScan(Image &image, Gauges &gauges);
    ~ZeroScan() override;

    std::vector<Planned> plan(GuestOffset at, std::uint64_t length, std::size_t most,
                              const StopCheck &stop = never) override;
    void run(GuestOffset at, std::uint64_t length, const StopCheck &stop) override;
    void commit(const StopCheck &stop) override;

  private:
    bool wanted(GuestCluster c, const Mapping &mapping) const;
    /// False: commit first, then ask again.
    bool look_at(GuestCluster c, const Mapping &seen);
    bool look_at_subclusters(GuestCluster c, HostCluster host);
    subclusters::Set zero_subclusters(GuestCluster c, const Mapping &mapping);
    bool may_be_zero(const Mapping &mapping) const;
    bool holds_zeroes(GuestCluster c, const Mapping &mapping, std::vector<std::byte> &bytes);

    Image &image_;
    State &state_;
    Gauges &gauges_;
    SparseBits known_; // by guest cluster: holds something
    std::atomic<bool> changed_{false};
};

} // namespace qlean
