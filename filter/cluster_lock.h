// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The filter's own lock over clusters. A guest write holds its clusters shared from before it clears the record until
// the inner write has returned; whoever records, and whoever gives a cluster back, holds them exclusively.
//
// Invariants: stripes are taken in ascending order and each once, so two requests can't wait for each other; a thread
// holds at most one set of clusters and never enters a second time (a reader that re-entered behind a waiting writer
// would wait for itself).

#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "filter/geometry.h"

namespace qlean {

/// A readers/writer lock in which a waiting writer holds new readers back. std::shared_mutex prefers readers: a guest
/// with overlapping writes would keep a discard waiting for ever.
class WriterPreferringLock {
  public:
    void lock();
    void unlock();
    void lock_shared();
    void unlock_shared();

  private:
    // One word, so that "may I enter" and "has anything changed since I looked" are the same question:
    // bit 31 a writer is inside; bits 16..30 writers waiting; bits 0..15 readers inside.
    static constexpr std::uint32_t writer_inside = 1U << 31;
    static constexpr std::uint32_t one_waiting = 1U << 16;
    static constexpr std::uint32_t waiting_mask = writer_inside - one_waiting;
    static constexpr std::uint32_t reader_mask = one_waiting - 1;

    std::atomic<std::uint32_t> state_{0};
};

class ClusterLocks {
  public:
    static constexpr std::size_t stripes = 1024;

    enum class Mode { shared, exclusive };

    /// Holds every cluster of a run for as long as it lives.
    class Hold {
      public:
        Hold(ClusterLocks &locks, ClusterRun run, Mode mode);
        ~Hold();
        Hold(const Hold &) = delete;
        Hold &operator=(const Hold &) = delete;

      private:
        template <typename F>
        void each_stripe(F f);

        ClusterLocks &locks_;
        ClusterRun run_;
        Mode mode_;
    };

  private:
    struct alignas(64) Stripe {
        WriterPreferringLock lock;
    };
    std::array<Stripe, stripes> stripes_;
};

} // namespace qlean
