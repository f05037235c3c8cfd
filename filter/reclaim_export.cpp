// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The maintenance export served by the filter.

#include "filter/reclaim_export.h"

#include <algorithm>
#include <cerrno>

#include "filter/disk_export.h"

namespace qlean {

namespace {

/// A client that wants more asks again from where the answer ended.
constexpr std::size_t most_extents = 32768;

/// How often a long CACHE looks whether anybody still wants it.
constexpr auto interrupt_interval = std::chrono::milliseconds(10);

int refuse(int *err) {
    *err = EPERM;
    return -1;
}

} // namespace

int ReclaimExport::prepare(nbdkit_next *next) {
    disk_ = inspect(next);
    const std::int64_t size = next->get_size(next);
    if (size == -1)
        return -1;
    watcher_.grow(static_cast<std::uint64_t>(size));
    const bool same_disk = static_cast<std::uint64_t>(size) == watcher_.geometry().disk_size();
    able_ = !readonly_ && same_disk && (disk_.trims || disk_.zeroes);
    return 0;
}

int ReclaimExport::block_size(nbdkit_next *, std::uint32_t *minimum, std::uint32_t *preferred, std::uint32_t *maximum) {
    *minimum = 1; // clients break on anything else
    *preferred = watcher_.geometry().cluster_size();
    *maximum = 0xffffffff;
    return 0;
}

int ReclaimExport::pread(nbdkit_next *, void *, std::uint32_t, std::uint64_t, std::uint32_t, int *err) {
    // The readahead filter answers reads with CACHE requests of its own: once read, this connection does nothing more.
    if (!was_read_.exchange(true))
        nbdkit_error("export 'reclaim' has no content: read its block status, and send CACHE on a new connection");
    return refuse(err);
}

int ReclaimExport::pwrite(nbdkit_next *, const void *, std::uint32_t, std::uint64_t, std::uint32_t, int *err) {
    return refuse(err);
}

int ReclaimExport::trim(nbdkit_next *, std::uint32_t, std::uint64_t, std::uint32_t, int *err) { return refuse(err); }

int ReclaimExport::zero(nbdkit_next *, std::uint32_t, std::uint64_t, std::uint32_t, int *err) { return refuse(err); }

int ReclaimExport::flush(nbdkit_next *next, std::uint32_t flags, int *err) {
    return disk_.flushes ? next->flush(next, flags, err) : 0;
}

int ReclaimExport::extents(nbdkit_next *, std::uint32_t count, std::uint64_t offset, std::uint32_t flags,
                           nbdkit_extents *extents, int *err) {
    const std::size_t most = (flags & NBDKIT_FLAG_REQ_ONE) ? 1 : most_extents;
    std::size_t added = 0;
    int result = 0;
    const auto add = [&](ByteRange part, bool to_do) {
        // A hole, but not "hole and zero": a backup of this export must fail, not succeed as a disk of zeroes.
        result = nbdkit_add_extent(extents, part.begin, part.length(), to_do ? 0 : NBDKIT_EXTENT_HOLE);
        return result == 0 && ++added < most;
    };
    const ByteRange range = {offset, offset + count};
    if (able_)
        watcher_.plan(disk_, range, add);
    else
        add(range, false);
    if (result == -1)
        *err = errno;
    return result;
}

int ReclaimExport::cache(nbdkit_next *, std::uint32_t count, std::uint64_t offset, std::uint32_t, int *err) {
    if (was_read_ || !able_)
        return refuse(err);
    // Sleeping for no time tells, in nbdkit, whether the client or the server is going.
    auto look_again = std::chrono::steady_clock::now() + interrupt_interval;
    const auto interrupted = [&look_again] {
        const auto now = std::chrono::steady_clock::now();
        if (now < look_again)
            return false;
        look_again = now + interrupt_interval;
        return nbdkit_nanosleep(0, 0) == -1;
    };
    return watcher_.reclaim(disk_, {offset, offset + count}, interrupted, err);
}

} // namespace qlean
