// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Serving the amended status page.

#include "filter/status_export.h"

#include <cstring>

namespace qlean {

int StatusExport::prepare(nbdkit_next *next) {
    const std::int64_t size = next->get_size(next);
    if (size == -1)
        return -1;
    // A foreign plugin may serve a disk under this name: that one is passed through.
    is_page_ = size == static_cast<std::int64_t>(status_page_size) && next->can_write(next) == 0;
    return 0;
}

int StatusExport::take_snapshot(nbdkit_next *next, int *err) {
    std::string page(status_page_size, '\0');
    if (next->pread(next, page.data(), status_page_size, 0, 0, err) == -1)
        return -1;
    const ReclaimStatus status = watcher_ ? watcher_->status() : ReclaimStatus{};
    if (auto amended = with_reclaim_status(page, status))
        page = std::move(*amended);
    page_ = std::move(page);
    return 0;
}

int StatusExport::pread(nbdkit_next *next, void *buffer, std::uint32_t count, std::uint64_t offset, std::uint32_t flags,
                        int *err) {
    if (!is_page_)
        return Export::pread(next, buffer, count, offset, flags, err);
    const Lock guard(mutex_);
    if ((offset == 0 || page_.empty()) && take_snapshot(next, err) == -1)
        return -1;
    std::memcpy(buffer, page_.data() + offset, count);
    return 0;
}

} // namespace qlean
