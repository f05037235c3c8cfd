// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// A reader/writer lock in four bytes that prefers writers. std::shared_mutex will not do: glibc prefers readers, and
// overlapping ones starved its writer for seconds. Not recursive: a thread that re-enters behind a waiting writer
// deadlocks. Meets SharedLockable, for std::shared_lock and std::unique_lock.
#pragma once

#include <atomic>
#include <cstdint>

namespace qlean {

class RwLock {
  public:
    void lock() {
        // One writer at a time holds `writer`; readers that come after it wait, readers before it drain.
        std::uint32_t seen = state_.load(std::memory_order_relaxed);
        for (;;) {
            if (seen & writer) {
                wait(seen);
                seen = state_.load(std::memory_order_relaxed);
            } else if (state_.compare_exchange_weak(seen, seen | writer, std::memory_order_acquire,
                                                    std::memory_order_relaxed)) {
                break;
            }
        }
        while (((seen = state_.load(std::memory_order_acquire)) & readers) != 0)
            wait(seen);
    }

    bool try_lock() {
        std::uint32_t expected = 0;
        return state_.compare_exchange_strong(expected, writer, std::memory_order_acquire, std::memory_order_relaxed);
    }

    void unlock() {
        if (state_.exchange(0, std::memory_order_release) & waiters)
            state_.notify_all();
    }

    void lock_shared() {
        std::uint32_t seen = state_.load(std::memory_order_relaxed);
        for (;;) {
            if (seen & writer) {
                wait(seen);
                seen = state_.load(std::memory_order_relaxed);
            } else if (state_.compare_exchange_weak(seen, seen + 1, std::memory_order_acquire,
                                                    std::memory_order_relaxed)) {
                return;
            }
        }
    }

    bool try_lock_shared() {
        std::uint32_t seen = state_.load(std::memory_order_relaxed);
        while (!(seen & writer))
            if (state_.compare_exchange_weak(seen, seen + 1, std::memory_order_acquire, std::memory_order_relaxed))
                return true;
        return false;
    }

    void unlock_shared() {
        const std::uint32_t before = state_.fetch_sub(1, std::memory_order_release);
        // The last reader wakes the writer that drains; clearing `waiters` is left to the writer's unlock.
        if ((before & readers) == 1 && (before & waiters))
            state_.notify_all();
    }

  private:
    static constexpr std::uint32_t writer = 1u << 31;
    static constexpr std::uint32_t waiters = 1u << 30;
    static constexpr std::uint32_t readers = waiters - 1;

    void wait(std::uint32_t seen) {
        if (!(seen & waiters)) {
            if (!state_.compare_exchange_strong(seen, seen | waiters, std::memory_order_relaxed))
                return;
            seen |= waiters;
        }
        state_.wait(seen, std::memory_order_relaxed);
    }

    std::atomic<std::uint32_t> state_{0};
};

} // namespace qlean
