// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Packs are the host clusters that hold compressed extents. This knows how full each one is, which are worth emptying
// so that what is in them fits into fewer, and where that goes. Arithmetic over what a walk met; nothing here is exact:
// an extent's end is known to the sector only, and the guest goes on meanwhile.
#pragma once

#include "../l2_entry.h"

#include <functional>
#include <vector>

namespace qlean {

class Packs {
  public:
    /// `referrers`: to one extent, at the most.
    Packs(const Geometry &geometry, std::uint64_t referrers);

    /// The extents of the image, in guest order: neighbours in guest order that are neighbours in the file tell where
    /// the first one ends.
    void add(const CompressedExtent &extent);
    /// Bytes of a cluster that an extent takes at the least, for a refcount has a limit.
    static std::uint64_t least_part(const Geometry &geometry, std::uint64_t referrers);

    using Question = std::function<bool(HostCluster)>;
    /// By host cluster: packs to empty, because what is in them fits into fewer. Whole stretches of packs, for an
    /// extent lies across two of them where they are adjacent. Nothing if less than `worth` clusters come free by it.
    std::vector<bool> worth_emptying(std::uint64_t worth) const;

    struct Moving {
        std::uint64_t packs = 0, bytes = 0;
        std::uint64_t least = 0; ///< clusters that it will take at the least
    };
    /// What is in packs that are `emptied`, or lie at or beyond `end`. Only the former are expected to become fewer.
    Moving moving(const std::vector<bool> &emptied, HostCluster end) const;

    /// Where extents are packed anew: what is or comes free below `end`.
    struct Site {
        HostCluster end;
        std::uint64_t clusters = 0;
    };
    /// The lowest site that takes `bytes`; not beyond `end`, where it may be too small.
    Site site(std::uint64_t bytes, HostCluster end, const std::vector<bool> &emptied, const Question &is_free) const;

  private:
    /// Calls f(host cluster, bytes) for the part of the extent in each host cluster.
    template <class F>
    void each_part(HostOffset at, std::uint64_t bytes, F &&f) const;
    /// How long the extent is, on average, that does not fit at the end of a stretch: long ones are less likely to.
    std::uint64_t misfit() const;

    Geometry geometry_;
    std::uint64_t unit_; ///< bytes that one of used_ stands for
    std::uint64_t least_;
    std::vector<std::uint16_t> used_; ///< by host cluster, in units
    std::uint64_t bytes_ = 0;         ///< of all extents
    double squares_ = 0;              ///< and their squares
    CompressedExtent last_{};
};

} // namespace qlean
