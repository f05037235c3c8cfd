// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The export `reclaim`: block status is the plan (flags 0 = a cluster that can be given back, hole = nothing to do),
// CACHE gives back, FLUSH makes durable. It has the size of the disk and no content. Below it the disk itself is open,
// and the giving back goes down through that.

#pragma once

#include <atomic>
#include <chrono>

#include "filter/export.h"
#include "filter/watcher.h"

namespace qlean {

class ReclaimExport : public Export {
  public:
    static constexpr const char *name = "reclaim";

    ReclaimExport(Watcher &watcher, bool readonly) : watcher_(watcher), readonly_(readonly) {}

    int prepare(nbdkit_next *next) override;

    const char *description(nbdkit_next *) override { return "discarded and zeroed ranges not yet given back"; }
    int block_size(nbdkit_next *, std::uint32_t *minimum, std::uint32_t *preferred, std::uint32_t *maximum) override;
    int can_write(nbdkit_next *) override { return 0; }
    int can_flush(nbdkit_next *) override { return 1; }
    int is_rotational(nbdkit_next *) override { return 0; }
    int can_trim(nbdkit_next *) override { return 0; }
    int can_zero(nbdkit_next *) override { return NBDKIT_ZERO_NONE; }
    int can_fast_zero(nbdkit_next *) override { return 0; }
    int can_extents(nbdkit_next *) override { return 1; }
    int can_fua(nbdkit_next *) override { return NBDKIT_FUA_NONE; }
    int can_cache(nbdkit_next *) override { return able_ ? NBDKIT_CACHE_NATIVE : NBDKIT_CACHE_NONE; }

    int pread(nbdkit_next *, void *, std::uint32_t, std::uint64_t, std::uint32_t, int *err) override;
    int pwrite(nbdkit_next *, const void *, std::uint32_t, std::uint64_t, std::uint32_t, int *err) override;
    int trim(nbdkit_next *, std::uint32_t, std::uint64_t, std::uint32_t, int *err) override;
    int zero(nbdkit_next *, std::uint32_t, std::uint64_t, std::uint32_t, int *err) override;
    int flush(nbdkit_next *next, std::uint32_t flags, int *err) override;
    int extents(nbdkit_next *, std::uint32_t count, std::uint64_t offset, std::uint32_t flags, nbdkit_extents *extents,
                int *err) override;
    int cache(nbdkit_next *, std::uint32_t count, std::uint64_t offset, std::uint32_t flags, int *err) override;

  private:
    Watcher &watcher_;
    bool readonly_;
    bool able_ = false; ///< this connection can give back
    InnerDisk disk_;
    std::atomic<bool> was_read_{false};
};

} // namespace qlean
