// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The sparse, bounded map from clusters to marked granules.

#include "filter/record.h"

#include <bit>
#include <new>

namespace qlean {

namespace {

constexpr std::uint32_t bits_per_word = 64;

/// What a node of the map costs beside its payload: three pointers, a colour, and the heap's own header.
constexpr std::size_t node_overhead = 48;

} // namespace

Record::Record(const Geometry &geometry, std::size_t memory) : geometry_(geometry) {
    const std::uint32_t granules = geometry.cluster_size() / geometry.granule_size();
    words_ = granules > bits_per_word ? granules / bits_per_word : 0;
    entry_bytes_ = sizeof(Clusters::value_type) + node_overhead;
    if (words_ > 0)
        entry_bytes_ += words_ * sizeof(std::uint64_t) + 16;
    shard_capacity_ = std::max<std::size_t>(1, memory / shard_count / entry_bytes_);
}

/// Calls f(shard, run) for each part of the run that lies in one shard, with that shard's mutex held, until f returns
/// false.
template <typename F>
void Record::each_block(ClusterRun run, F f) const {
    for (std::uint64_t at = run.first; at < run.end;) {
        const std::uint64_t end = std::min(run.end, ((at >> block_shift) + 1) << block_shift);
        Shard &shard = shard_of(at);
        const Lock guard(shard.mutex);
        if (!f(shard, ClusterRun{at, end}))
            return;
        at = end;
    }
}

bool Record::complete(const Clusters::value_type &entry) const {
    return entry.second.marked == geometry_.granules(entry.first);
}

/// Sets or clears granules [first, end) and returns how many changed.
std::uint32_t Record::change(Marks &marks, std::uint32_t first, std::uint32_t end, bool set) const {
    std::uint64_t *words = words_ > 0 ? marks.many.get() : &marks.few;
    std::uint32_t changed = 0;
    while (first < end) {
        const std::uint32_t bit = first % bits_per_word;
        const std::uint32_t count = std::min(end - first, bits_per_word - bit);
        const std::uint64_t mask = (count == bits_per_word ? ~std::uint64_t{0} : (std::uint64_t{1} << count) - 1)
                                   << bit;
        std::uint64_t &word = words[first / bits_per_word];
        changed += static_cast<std::uint32_t>(std::popcount((set ? ~word : word) & mask));
        word = set ? word | mask : word & ~mask;
        first += count;
    }
    return changed;
}

Record::Clusters::iterator Record::erase(Shard &shard, Clusters::iterator at) {
    shard.marked_granules -= at->second.marked;
    if (complete(*at))
        shard.ready_granules -= at->second.marked;
    entries_.fetch_sub(1, std::memory_order_relaxed);
    return shard.clusters.erase(at);
}

void Record::clear_granules(Shard &shard, Clusters::iterator at, ByteRange range) {
    const ByteRange bytes = geometry_.bytes({at->first, at->first + 1});
    if (range.begin <= bytes.begin && range.end >= bytes.end) {
        erase(shard, at);
        return;
    }
    const std::uint64_t granule = geometry_.granule_size();
    const auto first = static_cast<std::uint32_t>((std::max(range.begin, bytes.begin) - bytes.begin) / granule);
    const auto end = static_cast<std::uint32_t>((std::min(range.end, bytes.end) - bytes.begin + granule - 1) / granule);
    const bool was_complete = complete(*at);
    const std::uint32_t cleared = change(at->second, first, end, false);
    if (cleared > 0 && was_complete)
        shard.ready_granules -= at->second.marked;
    at->second.marked -= cleared;
    shard.marked_granules -= cleared;
    if (at->second.marked == 0)
        erase(shard, at);
}

void Record::written(ByteRange range) {
    if (entries_.load(std::memory_order_relaxed) == 0)
        return;
    range = geometry_.clip(range);
    each_block(geometry_.touched(range), [&](Shard &shard, ClusterRun run) WITH_LOCK(shard.mutex) {
        for (auto at = shard.clusters.lower_bound(run.first); at != shard.clusters.end() && at->first < run.end;) {
            const auto here = at++;
            clear_granules(shard, here, range);
        }
        return true;
    });
}

/// Forgets some other cluster of the shard if it is full; false if there is no other.
bool Record::make_room(Shard &shard, std::uint64_t keep) {
    while (shard.clusters.size() >= shard_capacity_) {
        auto victim = shard.clusters.lower_bound(shard.next_victim);
        if (victim == shard.clusters.end())
            victim = shard.clusters.begin();
        if (victim->first == keep && ++victim == shard.clusters.end())
            victim = shard.clusters.begin();
        if (victim->first == keep)
            return false;
        shard.next_victim = victim->first + 1;
        erase(shard, victim);
    }
    return true;
}

void Record::mark_cluster(Shard &shard, std::uint64_t cluster, ByteRange range, bool must_read_zero) {
    const ByteRange bytes = geometry_.bytes({cluster, cluster + 1});
    const std::uint64_t granule = geometry_.granule_size();
    auto at = shard.clusters.find(cluster);

    // Zeroes in part of a granule that was discarded are zeroes all the same: from now on the cluster must read so.
    if (at != shard.clusters.end() && must_read_zero)
        at->second.must_read_zero = true;

    // Inwards to whole granules; the end of the disk completes its last one.
    const std::uint64_t from = std::max(range.begin, bytes.begin) - bytes.begin;
    const std::uint64_t to = std::min(range.end, bytes.end) - bytes.begin;
    const auto first = static_cast<std::uint32_t>((from + granule - 1) / granule);
    const auto end = bytes.begin + to == geometry_.disk_size() ? geometry_.granules(cluster)
                                                               : static_cast<std::uint32_t>(to / granule);
    if (first >= end)
        return;

    if (at == shard.clusters.end()) {
        if (!make_room(shard, cluster))
            return;
        Marks fresh;
        fresh.must_read_zero = must_read_zero;
        if (words_ > 0)
            fresh.many = std::make_unique<std::uint64_t[]>(words_);
        at = shard.clusters.emplace(cluster, std::move(fresh)).first;
        entries_.fetch_add(1, std::memory_order_relaxed);
    }
    const std::uint32_t added = change(at->second, first, end, true);
    at->second.marked += added;
    shard.marked_granules += added;
    if (added > 0 && complete(*at))
        shard.ready_granules += at->second.marked;
}

void Record::mark(ByteRange range, bool must_read_zero) noexcept {
    try {
        range = geometry_.clip(range);
        each_block(geometry_.touched(range), [&](Shard &shard, ClusterRun run) WITH_LOCK(shard.mutex) {
            for (std::uint64_t cluster = run.first; cluster < run.end; cluster++)
                mark_cluster(shard, cluster, range, must_read_zero);
            return true;
        });
    } catch (const std::bad_alloc &) {
        // What isn't recorded isn't given back: space is lost, not data. The guest's request has already succeeded.
    }
}

std::optional<Record::Ready> Record::next_ready(ClusterRun within, std::uint64_t longest) const {
    std::optional<Ready> found;
    if (entries_.load(std::memory_order_relaxed) == 0)
        return found;
    each_block(within, [&](Shard &shard, ClusterRun run) WITH_LOCK(shard.mutex) {
        if (shard.ready_granules == 0)
            return !found;
        for (auto at = shard.clusters.lower_bound(run.first); at != shard.clusters.end() && at->first < run.end; ++at) {
            const bool extends = found && at->first == found->clusters.end &&
                                 at->second.must_read_zero == found->must_read_zero &&
                                 found->clusters.count() < longest && complete(*at);
            if (extends)
                found->clusters.end++;
            else if (found)
                return false;
            else if (complete(*at))
                found = Ready{{at->first, at->first + 1}, at->second.must_read_zero};
        }
        return !found || found->clusters.end == run.end;
    });
    return found;
}

Record::Totals Record::totals() const {
    Totals sum;
    for (const Shard &shard : shards_) {
        const Lock guard(shard.mutex);
        sum.recorded_bytes += shard.marked_granules * geometry_.granule_size();
        sum.ready_bytes += shard.ready_granules * geometry_.granule_size();
    }
    return sum;
}

std::size_t Record::memory_used() const { return entries_.load(std::memory_order_relaxed) * entry_bytes_; }

} // namespace qlean
