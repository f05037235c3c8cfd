// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Watching the guest and giving clusters back. See the header for the rules; the order of the lines below is the rule.

#include "filter/watcher.h"

#include <algorithm>
#include <cerrno>

#include "filter/zero_payload.h"

namespace qlean {

namespace {

/// A discard of gigabytes goes down in pieces of this size, so that a guest write never waits for all of it.
constexpr std::uint64_t punch_chunk_bytes = 32 << 20;

/// One step of a reclaim: a guest write waits for one inner call of this size at most (or for one cluster).
constexpr std::uint64_t reclaim_step_bytes = 2 << 20;

ByteRange range_of(std::uint64_t offset, std::uint32_t count) { return {offset, offset + count}; }

bool holds_a_granule(ByteRange r, std::uint64_t granule) { return (r.begin + granule - 1) / granule < r.end / granule; }

} // namespace

void Watcher::grow(std::uint64_t disk_size) {
    if (disk_size <= geometry_.disk_size())
        return;
    const Hold everything(locks_, {0, ClusterLocks::stripes}, ClusterLocks::Mode::exclusive);
    const std::uint64_t before = geometry_.disk_size();
    if (disk_size <= before)
        return;
    // The last cluster may have been complete with fewer granules than it has now.
    if (before % geometry_.cluster_size() != 0)
        record_.forget({before / geometry_.cluster_size(), before / geometry_.cluster_size() + 1});
    geometry_.grow(disk_size);
}

int Watcher::write(const InnerDisk &disk, const void *buffer, std::uint32_t count, std::uint64_t offset,
                   std::uint32_t flags, int *err) {
    const ByteRange range = range_of(offset, count);
    const ClusterRun clusters = geometry_.touched(range);
    // Zeroes are worth remembering only if they can be given back as zeroes. (The cut granule at a disk's odd end isn't
    // worth reading a payload for.)
    if (disk.zeroes && holds_a_granule(range, geometry_.granule_size()) && is_all_zero(buffer, count)) {
        const Hold hold(locks_, clusters, ClusterLocks::Mode::exclusive);
        const int r = disk.next->pwrite(disk.next, buffer, count, offset, flags, err);
        if (r == 0)
            record_.zeroed(range);
        else
            record_.written(range);
        return r;
    }
    const Hold hold(locks_, clusters, ClusterLocks::Mode::shared);
    record_.written(range);
    return disk.next->pwrite(disk.next, buffer, count, offset, flags, err);
}

int Watcher::unwatched_change(ByteRange range, const std::function<int()> &inner) {
    const Hold hold(locks_, geometry_.touched(range), ClusterLocks::Mode::shared);
    record_.written(range);
    return inner();
}

int Watcher::trim(const InnerDisk &disk, std::uint32_t count, std::uint64_t offset, std::uint32_t flags, int *err) {
    return punch(disk, Kind::discard, range_of(offset, count), flags, err);
}

int Watcher::zero(const InnerDisk &disk, std::uint32_t count, std::uint64_t offset, std::uint32_t flags, int *err) {
    const bool may_trim = (flags & NBDKIT_FLAG_MAY_TRIM) != 0;
    return punch(disk, may_trim ? Kind::zero_may_trim : Kind::zero_keep, range_of(offset, count), flags, err);
}

int Watcher::punch(const InnerDisk &disk, Kind kind, ByteRange range, std::uint32_t flags, int *err) {
    const std::uint64_t chunk = std::max<std::uint64_t>(punch_chunk_bytes, geometry_.cluster_size());
    const auto chunk_end = [&](std::uint64_t at) { return std::min(range.end, (at / chunk + 1) * chunk); };

    // Several pieces need to be made durable only once, at the end.
    const bool flush_at_end = (flags & NBDKIT_FLAG_FUA) && disk.flushes && chunk_end(range.begin) < range.end;
    if (flush_at_end)
        flags &= ~NBDKIT_FLAG_FUA;

    for (std::uint64_t at = range.begin; at < range.end; at = chunk_end(at))
        if (punch_chunk(disk, kind, {at, chunk_end(at)}, flags, err) == -1)
            return -1;
    return flush_at_end ? disk.next->flush(disk.next, 0, err) : 0;
}

int Watcher::punch_chunk(const InnerDisk &disk, Kind kind, ByteRange range, std::uint32_t flags, int *err) {
    const ClusterRun touched = geometry_.touched(range);
    const auto count = static_cast<std::uint32_t>(range.length());
    const Hold hold(locks_, touched, ClusterLocks::Mode::exclusive);

    const int r = kind == Kind::discard ? disk.next->trim(disk.next, count, range.begin, flags, err)
                                        : disk.next->zero(disk.next, count, range.begin, flags, err);
    if (r == -1 || (kind != Kind::discard && !disk.zeroes)) {
        record_.written(range);
        return r;
    }
    if (kind == Kind::zero_keep) {
        // The guest asked for no hole: remembered, and given back only when a person asks through the export.
        record_.zeroed(range);
        return 0;
    }
    // Clusters wholly in the range were freed by the inner call; only those cut by its ends are remembered.
    const ClusterRun whole = geometry_.covered(range);
    record_.forget(whole);
    const auto remember = [&](std::uint64_t cluster) {
        const ByteRange bytes = geometry_.bytes({cluster, cluster + 1});
        const ByteRange part = {std::max(range.begin, bytes.begin), std::min(range.end, bytes.end)};
        if (kind == Kind::discard)
            record_.discarded(part);
        else
            record_.zeroed(part);
        give_back_if_complete(disk, cluster);
    };
    if (touched.empty())
        return 0;
    const auto is_whole = [&](std::uint64_t cluster) { return cluster >= whole.first && cluster < whole.end; };
    if (!is_whole(touched.first))
        remember(touched.first);
    if (touched.end - 1 != touched.first && !is_whole(touched.end - 1))
        remember(touched.end - 1);
    return 0;
}

/// The piece just discarded may have been the last one. The guest's own request has succeeded already, so a failure
/// here isn't the guest's: give_back has forgotten the cluster, and that is all.
void Watcher::give_back_if_complete(const InnerDisk &disk, std::uint64_t cluster) {
    const auto ready = record_.next_ready({cluster, cluster + 1}, 1);
    int ignored = 0;
    if (ready && can_give_back(disk, *ready) && give_back(disk, *ready, &ignored) == -1)
        nbdkit_debug("reclaim: cluster at %llu was not given back: error %d",
                     static_cast<unsigned long long>(geometry_.bytes(ready->clusters).begin), ignored);
}

bool Watcher::can_give_back(const InnerDisk &disk, const Record::Ready &ready) {
    return disk.zeroes || (disk.trims && !ready.must_read_zero);
}

/// Frees clusters the caller holds exclusively and has just seen complete. A discard says enough where nothing was
/// written; where zeroes were, only a zeroing is sure to keep them (a discard promises no content).
int Watcher::give_back(const InnerDisk &disk, const Record::Ready &ready, int *err) {
    const ByteRange bytes = geometry_.bytes(ready.clusters);
    const auto count = static_cast<std::uint32_t>(bytes.length());
    const int r = disk.trims && !ready.must_read_zero
                      ? disk.next->trim(disk.next, count, bytes.begin, 0, err)
                      : disk.next->zero(disk.next, count, bytes.begin, NBDKIT_FLAG_MAY_TRIM, err);
    record_.forget(ready.clusters);
    if (r == 0)
        given_back_bytes_.fetch_add(bytes.length(), std::memory_order_relaxed);
    return r;
}

void Watcher::plan(const InnerDisk &disk, ByteRange range, const std::function<bool(ByteRange, bool)> &add) const {
    const ClusterRun touched = geometry_.touched(range);
    std::uint64_t at = range.begin; // what is before it has been added
    ByteRange to_do = {range.begin, range.begin};
    const auto add_to_do = [&] {
        if (to_do.begin > at && !add({at, to_do.begin}, false))
            return false;
        at = to_do.end;
        return to_do.begin == to_do.end || add(to_do, true);
    };
    for (std::uint64_t cluster = touched.first; cluster < touched.end;) {
        const auto ready = record_.next_ready({cluster, touched.end}, touched.count());
        if (!ready)
            break;
        cluster = ready->clusters.end;
        if (!can_give_back(disk, *ready))
            continue;
        ByteRange found = geometry_.bytes(ready->clusters);
        found = {std::max(found.begin, range.begin), std::min(found.end, range.end)};
        if (found.begin == to_do.end) {
            to_do.end = found.end; // runs of the two kinds side by side are one extent
            continue;
        }
        if (!add_to_do())
            return;
        to_do = found;
    }
    if (add_to_do() && at < range.end)
        add({at, range.end}, false);
}

int Watcher::reclaim(const InnerDisk &disk, ByteRange range, const std::function<bool()> &interrupted, int *err) {
    const std::uint64_t step = std::max<std::uint64_t>(1, reclaim_step_bytes / geometry_.cluster_size());
    ClusterRun left = geometry_.touched(range);
    while (!left.empty()) {
        // A look without the lock, to find the next clusters; it proves nothing about them.
        const auto candidate = record_.next_ready(left, step);
        if (!candidate)
            return 0;
        if (interrupted()) {
            *err = ESHUTDOWN;
            return -1;
        }
        left.first = candidate->clusters.end;

        const Hold hold(locks_, candidate->clusters, ClusterLocks::Mode::exclusive);
        ClusterRun held = candidate->clusters;
        while (const auto ready = record_.next_ready(held, step)) {
            held.first = ready->clusters.end;
            if (can_give_back(disk, *ready) && give_back(disk, *ready, err) == -1)
                return -1;
        }
    }
    return 0;
}

ReclaimStatus Watcher::status() const {
    const Record::Totals totals = record_.totals();
    ReclaimStatus s;
    s.granularity = geometry_.granule_size();
    s.recorded_bytes = totals.recorded_bytes;
    s.ready_bytes = totals.ready_bytes;
    s.given_back_bytes = given_back_bytes_.load(std::memory_order_relaxed);
    return s;
}

} // namespace qlean
