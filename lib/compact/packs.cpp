// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "packs.h"

#include "../refcount_block.h"

namespace qlean {

namespace {

constexpr std::uint64_t units_per_cluster = 32768;
constexpr std::uint64_t sector = 512;
/// The share of a pack that may be wasted.
constexpr std::int64_t bearable_share = 10;

} // namespace

Packs::Packs(const Geometry &geometry, std::uint64_t referrers)
    : geometry_(geometry), unit_(std::max<std::uint64_t>(geometry.cluster_size() / units_per_cluster, 1)),
      least_(least_part(geometry, referrers)) {}

std::uint64_t Packs::least_part(const Geometry &geometry, std::uint64_t referrers) {
    const std::uint64_t extents = std::max<std::uint64_t>(RefcountView::max(geometry.refcount_order()) / referrers, 1);
    return divide_up(geometry.cluster_size(), extents);
}

template <class F>
void Packs::each_part(HostOffset at, std::uint64_t bytes, F &&f) const {
    while (bytes > 0) {
        const HostCluster c = geometry_.cluster_of(at);
        const std::uint64_t n = std::min(bytes, geometry_.offset_of(c + 1) - at);
        f(c, n);
        at += n;
        bytes -= n;
    }
}

void Packs::add(const CompressedExtent &extent) {
    // The sector in which one ends and the next begins was counted for both.
    const HostOffset last_end = last_.at + last_.bytes;
    if (extent.at > last_.at && extent.at < last_end && last_end - extent.at < sector) {
        std::uint16_t &used = used_[geometry_.cluster_of(extent.at).value];
        used = static_cast<std::uint16_t>(used - std::min<std::uint64_t>((last_end - extent.at) / unit_, used));
    }
    last_ = extent;
    bytes_ += extent.bytes;
    squares_ += static_cast<double>(extent.bytes) * static_cast<double>(extent.bytes);
    each_part(extent.at, extent.bytes, [&](HostCluster c, std::uint64_t bytes) {
        if (used_.size() <= c.value)
            used_.resize(std::max<std::uint64_t>(c.value + 1, used_.size() * 5 / 4));
        const std::uint64_t sum = used_[c.value] + divide_up(std::max(bytes, least_), unit_);
        used_[c.value] = static_cast<std::uint16_t>(std::min(sum, geometry_.cluster_size() / unit_));
    });
}

std::uint64_t Packs::misfit() const {
    return bytes_ == 0 ? 0 : static_cast<std::uint64_t>(squares_ / static_cast<double>(bytes_));
}

std::vector<bool> Packs::worth_emptying(std::uint64_t worth) const {
    const auto full = static_cast<std::int64_t>(geometry_.cluster_size() / unit_);
    const auto bearable = full / bearable_share;
    // At each end of a stretch an extent leaves half of itself empty in the neighbour.
    const auto ends = static_cast<std::int64_t>(misfit() / unit_) + 1;
    std::vector<bool> result(used_.size());
    // Stretches in which more is wasted than may be, on balance: grown as long as that does not fall by more than what
    // beginning anew would cost.
    std::int64_t sum = 0, best = 0, gain = 0, wasted = 0, best_wasted = 0;
    std::uint64_t begin = 0, end = 0;
    const auto finish = [&] {
        if (best > ends) {
            for (std::uint64_t c = begin; c < end; ++c)
                result[c] = used_[c] != 0;
            gain += best_wasted - ends;
        }
        sum = best = wasted = best_wasted = 0;
    };
    for (std::uint64_t c = 0; c < used_.size(); ++c) {
        if (used_[c] == 0)
            continue;
        if (sum == 0)
            begin = c;
        sum += full - used_[c] - bearable;
        wasted += full - used_[c];
        if (sum > best) {
            best = sum;
            best_wasted = wasted;
            end = c + 1;
        } else if (sum <= 0 || best - sum > ends) {
            finish();
        }
    }
    finish();
    if (gain < static_cast<std::int64_t>(worth) * full)
        return {};
    return result;
}

Packs::Moving Packs::moving(const std::vector<bool> &emptied, HostCluster end) const {
    Moving result;
    std::uint64_t bytes_emptied = 0;
    for (std::uint64_t c = 0; c < used_.size(); ++c)
        if (used_[c] != 0 && (c >= end.value || (c < emptied.size() && emptied[c]))) {
            ++result.packs;
            result.bytes += used_[c] * unit_;
            if (c < emptied.size() && emptied[c])
                bytes_emptied += used_[c] * unit_;
            else
                ++result.least;
        }
    result.least += geometry_.clusters_for(bytes_emptied);
    return result;
}

Packs::Site Packs::site(std::uint64_t bytes, HostCluster end, const std::vector<bool> &emptied,
                        const Question &is_free) const {
    const std::uint64_t size = geometry_.cluster_size();
    const auto wanted = static_cast<std::int64_t>(bytes);
    // An extent does not leap: some room is lost where a stretch of adjacent clusters ends. Rather too much is assumed:
    // an end that turns out too high comes down with the next pass.
    // Nothing is lost where each extent has its clusters alone.
    const auto lost = static_cast<std::int64_t>(std::min({misfit(), size - least_, size / 2}));
    Site site{{0}, 0};
    std::int64_t room = 0;
    for (bool adjacent = false; room < wanted && site.end < end; ++site.end) {
        const std::uint64_t c = site.end.value;
        const bool is_room = (c < emptied.size() && emptied[c]) || is_free({c});
        if (is_room) {
            room += static_cast<std::int64_t>(size) - (adjacent ? 0 : lost);
            ++site.clusters;
        }
        adjacent = is_room;
    }
    if (room < wanted)
        site.clusters += geometry_.clusters_for(static_cast<std::uint64_t>(wanted - room));
    return site;
}

} // namespace qlean
