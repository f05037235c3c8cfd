// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// What was moved, or is being moved, and still occupies the place that it came from, in bytes: the extra space that
// compaction takes. Never more than the limit. A thread of its own gives back while others move; one at a time does.
// All methods from any thread.
#pragma once

#include "../thread_safety.h"

#include <cstdint>
#include <exception>
#include <functional>
#include <thread>
#include <utility>

namespace qlean {

class Uncommitted {
  public:
    /// Room for one move. Given up with the object, unless that has moved.
    class Share {
      public:
        Share(Uncommitted &owner, std::uint64_t bytes) : owner_(&owner), bytes_(bytes) {}
        Share(const Share &) = delete;
        Share &operator=(const Share &) = delete;
        ~Share();
        void moved();

      private:
        Uncommitted *owner_;
        std::uint64_t bytes_;
    };

    /// While it lives nobody else gives back. If it is done(), what had moved when it began is out of the count then.
    class Return {
      public:
        explicit Return(Uncommitted &owner);
        Return(const Return &) = delete;
        Return &operator=(const Return &) = delete;
        ~Return();
        void done() { done_ = true; }
        void failed(std::exception_ptr how) { failure_ = std::move(how); }

      private:
        Uncommitted &owner_;
        std::uint64_t bytes_;
        bool done_ = false;
        std::exception_ptr failure_;
    };

    /// `give_back` makes durable what has moved and gives back where it was; it is called with no lock held.
    explicit Uncommitted(std::function<void()> give_back) : give_back_(std::move(give_back)) {}
    Uncommitted(const Uncommitted &) = delete;
    Uncommitted &operator=(const Uncommitted &) = delete;
    ~Uncommitted() { stop(); }

    /// Before `bytes` are moved; more than `limit` are let through alone. At the limit it waits. Throws what giving
    /// back threw since the last call: once, and then that is tried again.
    [[nodiscard]] Share take(std::uint64_t bytes, std::uint64_t limit);

    bool any_moved() const;

    /// Nobody gives back in the background any more; what has moved stays counted. No take() after it.
    void stop();

  private:
    void change(std::uint64_t dropped, std::uint64_t moved);
    bool worth_returning() const WITH_LOCK(mutex_);
    void keep_returning();

    const std::function<void()> give_back_;
    mutable Mutex mutex_;
    std::condition_variable changed_;              ///< anything below
    std::uint64_t taken_ PROTECTED_BY(mutex_) = 0; ///< being moved, or moved
    std::uint64_t moved_ PROTECTED_BY(mutex_) = 0; ///< of these, moved
    std::uint64_t limit_ PROTECTED_BY(mutex_) = 0;
    unsigned waiting_ PROTECTED_BY(mutex_) = 0; ///< for room
    unsigned queued_ PROTECTED_BY(mutex_) = 0;  ///< for a return: they go first
    bool returning_ PROTECTED_BY(mutex_) = false;
    bool stops_ PROTECTED_BY(mutex_) = false;
    std::exception_ptr failure_ PROTECTED_BY(mutex_); ///< of the last return, until somebody has been told
    std::thread thread_;
};

} // namespace qlean
