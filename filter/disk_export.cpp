// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The guest's disk, watched, and other names it may have.

#include "filter/disk_export.h"

#include "filter/watcher.h"

namespace qlean {

InnerDisk inspect(nbdkit_next *next) {
    InnerDisk disk;
    disk.next = next;
    const bool writes = next->get_size(next) >= 0 && next->can_write(next) == 1;
    disk.flushes = next->can_flush(next) == 1;
    disk.trims = writes && next->can_trim(next) == 1;
    disk.zeroes = writes && next->can_zero(next) == NBDKIT_ZERO_NATIVE;
    next->can_fua(next);
    next->can_fast_zero(next);
    return disk;
}

int OtherExport::pwrite(nbdkit_next *next, const void *buffer, std::uint32_t count, std::uint64_t offset,
                        std::uint32_t flags, int *err) {
    const auto inner = [&] { return Export::pwrite(next, buffer, count, offset, flags, err); };
    return watcher_ ? watcher_->unwatched_change({offset, offset + count}, inner) : inner();
}

int OtherExport::trim(nbdkit_next *next, std::uint32_t count, std::uint64_t offset, std::uint32_t flags, int *err) {
    const auto inner = [&] { return Export::trim(next, count, offset, flags, err); };
    return watcher_ ? watcher_->unwatched_change({offset, offset + count}, inner) : inner();
}

int OtherExport::zero(nbdkit_next *next, std::uint32_t count, std::uint64_t offset, std::uint32_t flags, int *err) {
    const auto inner = [&] { return Export::zero(next, count, offset, flags, err); };
    return watcher_ ? watcher_->unwatched_change({offset, offset + count}, inner) : inner();
}

int DiskExport::prepare(nbdkit_next *next) {
    disk_ = inspect(next);
    const std::int64_t size = next->get_size(next);
    if (size == -1)
        return -1;
    // A disk that was resized is larger for new connections; one that became smaller is passed through, for the record
    // knows another end.
    if (watcher_)
        watcher_->grow(static_cast<std::uint64_t>(size));
    watched_ = watcher_ && static_cast<std::uint64_t>(size) == watcher_->geometry().disk_size();
    return 0;
}

int DiskExport::pwrite(nbdkit_next *next, const void *buffer, std::uint32_t count, std::uint64_t offset,
                       std::uint32_t flags, int *err) {
    return watched_ ? watcher_->write(disk_, buffer, count, offset, flags, err)
                    : OtherExport::pwrite(next, buffer, count, offset, flags, err);
}

int DiskExport::trim(nbdkit_next *next, std::uint32_t count, std::uint64_t offset, std::uint32_t flags, int *err) {
    return watched_ ? watcher_->trim(disk_, count, offset, flags, err)
                    : OtherExport::trim(next, count, offset, flags, err);
}

int DiskExport::zero(nbdkit_next *next, std::uint32_t count, std::uint64_t offset, std::uint32_t flags, int *err) {
    return watched_ ? watcher_->zero(disk_, count, offset, flags, err)
                    : OtherExport::zero(next, count, offset, flags, err);
}

} // namespace qlean
