// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Stopping without an I/O error. nbdkit's own answer to SIGTERM is to refuse requests, which the guest sees as broken
// disk; this one lets requests in flight finish, holds new ones unanswered, leaves the image clean and ends the
// process. A QEMU with reconnect-delay then sends what was held to the next server.
#pragma once

#include "lib/at_work.h"
#include "lib/rw_lock.h"
#include "lib/thread_safety.h"
#include "processor.h"

#include <array>
#include <atomic>
#include <functional>
#include <mutex>
#include <shared_mutex>

namespace qlean::plugin {

class Gate {
    /// A lock that readers take at a door of their processor: no memory that all requests write to.
    class Doors {
      public:
        RwLock &mine() { return doors_[processor() % count].lock; }
        void lock() {
            for (Door &door : doors_)
                door.lock.lock();
        }
        void unlock() {
            for (Door &door : doors_)
                door.lock.unlock();
        }

      private:
        static constexpr std::size_t count = 32;
        struct alignas(64) Door {
            RwLock lock;
        };
        std::array<Door, count> doors_;
    };

  public:
    template <class Lock>
    struct Entry {
        Lock lock;
        AtWork at_work;
    };
    /// Held by every request while it runs. Blocks for good once the server stops.
    Entry<std::shared_lock<RwLock>> enter() { return {std::shared_lock(doors_.mine()), {}}; }
    /// Held by a request that nothing may run beside: waits for those in flight, and holds new ones unanswered.
    Entry<std::unique_lock<Doors>> enter_alone() {
        waiting_alone_.fetch_add(1);
        std::unique_lock alone(doors_);
        waiting_alone_.fetch_sub(1);
        return {std::move(alone), {}};
    }
    /// True from the moment that stopping was asked for, or that somebody wants to be alone: long requests end early.
    bool closing() const { return stopping() || waiting_alone_.load() != 0; }
    /// Of these, that the server stops.
    bool stopping() const { return closing_.load(std::memory_order_acquire); }

    /// Takes over SIGTERM, SIGINT, SIGHUP and SIGQUIT: on the first, `leave` runs once no request does. Then the
    /// process ends, with status 0 if `leave` returned true: by itself while clients are connected, for nbdkit would
    /// answer what is held with errors; through nbdkit, which lets filters finish their work, when there are none. (A
    /// crash in there, after `leave`, is reported, and the status stays 0.)
    /// SIGABRT ends in order too where that is possible, with status 134; not if a thread aborted that was at work on
    /// the image. Call after nbdkit has forked.
    void own_signals(std::function<bool()> leave);
    void connected() { connections_.fetch_add(1); }
    void disconnected() { connections_.fetch_sub(1); }
    /// Stops every later request, waiting for those in flight, then runs `leave`; the second caller only waits for it.
    bool shut(const std::function<bool()> &leave);
    /// From nbdkit's cleanup: what nbdkit_shutdown() uses is about to be closed, so it has to have returned.
    void await_shutdown() { const Lock guard(shutdown_); }

  private:
    Doors doors_;
    std::atomic<bool> closing_{false};
    std::atomic<int> waiting_alone_{0};
    std::atomic<int> connections_{0};
    std::once_flag left_;
    bool left_well_ = false;
    Mutex shutdown_; ///< held while nbdkit is told to end
};

} // namespace qlean::plugin
