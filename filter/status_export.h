// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The plugin's export `status` with the filter's part added. The page a connection reads is one snapshot, taken when
// it reads offset 0.

#pragma once

#include <string>

#include "filter/disk_export.h"
#include "lib/thread_safety.h"

namespace qlean {

class StatusExport : public OtherExport {
  public:
    static constexpr const char *name = "status";

    /// watcher: null if nothing is watched.
    explicit StatusExport(Watcher *watcher) : OtherExport(watcher) {}

    int prepare(nbdkit_next *next) override;
    int pread(nbdkit_next *next, void *buffer, std::uint32_t count, std::uint64_t offset, std::uint32_t flags,
              int *err) override;

  private:
    int take_snapshot(nbdkit_next *next, int *err) WITH_LOCK(mutex_);

    bool is_page_ = false; ///< of the size and kind of a status page
    Mutex mutex_;
    std::string page_ PROTECTED_BY(mutex_); ///< empty before the first read
};

} // namespace qlean
