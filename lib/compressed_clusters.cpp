// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "compressed_clusters.h"

#include "error.h"

#include <cstring>

namespace qlean {

namespace {

constexpr std::uint64_t max_kept_bytes = 16 * 1024 * 1024;
constexpr std::uint64_t min_kept_clusters = 4;
constexpr std::uint64_t max_kept_clusters = 4096;

} // namespace

std::uint64_t CompressedClusters::memory_bytes() const {
    return geometry_.bytes(kept_.load(std::memory_order_relaxed));
}

void CompressedClusters::read(GuestCluster c, std::uint64_t word, std::uint64_t within, std::span<std::byte> into) {
    // Who wants all of it at once will not come back for the rest.
    const bool whole = within == 0 && into.size() == geometry_.cluster_size();
    const auto kept = find(c, word, !whole);
    if (!kept)
        return decompress(c, word, into);
    const Lock guard(kept->mutex);
    if (!kept->bytes) {
        auto bytes = std::make_unique_for_overwrite<std::byte[]>(geometry_.cluster_size());
        decompress(c, word, std::span(bytes.get(), geometry_.cluster_size()));
        kept->bytes = std::move(bytes);
    }
    std::memcpy(into.data(), kept->bytes.get() + within, into.size());
}

std::shared_ptr<CompressedClusters::Kept> CompressedClusters::find(GuestCluster c, std::uint64_t word, bool make) {
    if (!make && kept_.load(std::memory_order_relaxed) == 0)
        return nullptr;
    const Lock guard(mutex_);
    if (const auto found = by_cluster_.find(c.value); found != by_cluster_.end()) {
        if (found->second->second->word == word) {
            order_.splice(order_.begin(), order_, found->second);
            return order_.front().second;
        }
        // Another entry for the same place of the disk, as a snapshot may have.
        if (!make)
            return nullptr;
        order_.erase(found->second);
        by_cluster_.erase(found);
    }
    if (!make)
        return nullptr;
    const std::uint64_t most =
        std::clamp(max_kept_bytes >> geometry_.cluster_bits(), min_kept_clusters, max_kept_clusters);
    while (by_cluster_.size() >= most) {
        by_cluster_.erase(order_.back().first.value);
        order_.pop_back();
    }
    auto kept = std::make_shared<Kept>();
    kept->word = word;
    order_.emplace_front(c, kept);
    by_cluster_.emplace(c.value, order_.begin());
    kept_.store(by_cluster_.size(), std::memory_order_relaxed);
    return kept;
}

void CompressedClusters::forget(GuestCluster c) {
    if (kept_.load(std::memory_order_relaxed) == 0)
        return;
    const Lock guard(mutex_);
    const auto found = by_cluster_.find(c.value);
    if (found == by_cluster_.end())
        return;
    order_.erase(found->second);
    by_cluster_.erase(found);
    kept_.store(by_cluster_.size(), std::memory_order_relaxed);
}

void CompressedClusters::decompress(GuestCluster c, std::uint64_t word, std::span<std::byte> cluster) {
    const CompressedExtent extent = entry::compressed_extent(word, geometry_.cluster_bits());
    const auto bytes = std::make_unique_for_overwrite<std::byte[]>(extent.bytes);
    const std::span from(bytes.get(), extent.bytes);
    file_.read(from, extent.at);
    decompressed_.fetch_add(1, std::memory_order_relaxed);
    if (!compression::decompress(type_, from, cluster).filled)
        throw_bad_image(
            "'{}' is damaged: the compressed cluster at guest offset {:#x} (host bytes {:#x} to {:#x}) does "
            "not decompress; overwrite that part of the disk, or restore the image from a backup",
            file_.name(), geometry_.offset_of(c).value, extent.at.value, (extent.at + extent.bytes).value);
}

} // namespace qlean
