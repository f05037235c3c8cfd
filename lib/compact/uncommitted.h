// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// What was moved, or is being moved, and still occupies the place that it came from, in bytes: the extra space that
// compaction takes. Never more than the limit; one thread at a time gives back. All methods from any thread.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <mutex>
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
        ~Share() {
            if (owner_)
                owner_->change(bytes_, 0);
        }
        void moved() { std::exchange(owner_, nullptr)->change(0, bytes_); }

      private:
        Uncommitted *owner_;
        std::uint64_t bytes_;
    };

    /// While it lives nobody else gives back. What had moved when it began is out of the count after done().
    class Return {
      public:
        explicit Return(Uncommitted &owner) : owner_(owner) {
            std::unique_lock lock(owner.mutex_);
            owner.changed_.wait(lock, [&] { return !owner.returning_; });
            begin();
        }
        Return(Uncommitted &owner, const std::unique_lock<std::mutex> &) : owner_(owner) { begin(); }
        Return(const Return &) = delete;
        Return &operator=(const Return &) = delete;
        ~Return() {
            const std::lock_guard lock(owner_.mutex_);
            owner_.returning_ = false;
            owner_.changed_.notify_all();
        }
        void done() {
            const std::lock_guard lock(owner_.mutex_);
            owner_.moved_ -= bytes_;
            owner_.taken_ -= bytes_;
        }

      private:
        void begin() {
            owner_.returning_ = true;
            bytes_ = owner_.moved_;
        }
        Uncommitted &owner_;
        std::uint64_t bytes_;
    };

    /// Before `bytes` are moved. At three quarters of the limit whoever comes gives back, and others go on meanwhile;
    /// at the limit they wait for it. Throws what `give_back` throws.
    template <class GiveBack>
    [[nodiscard]] Share take(std::uint64_t bytes, std::uint64_t limit, const GiveBack &give_back) {
        limit = std::max(limit, bytes);
        std::unique_lock lock(mutex_);
        for (;;) {
            const bool fits = taken_ + bytes <= limit;
            if (!returning_ && (moved_ >= limit / 4 * 3 || (!fits && moved_ != 0))) {
                Return returning(*this, lock);
                lock.unlock();
                give_back();
                returning.done();
            } else if (fits) {
                taken_ += bytes;
                return {*this, bytes};
            } else {
                changed_.wait(lock);
                continue;
            }
            lock.lock(); // after the end of `returning`
        }
    }

    bool any_moved() const {
        const std::lock_guard lock(mutex_);
        return moved_ != 0;
    }

  private:
    void change(std::uint64_t dropped, std::uint64_t moved) {
        const std::lock_guard lock(mutex_);
        taken_ -= dropped;
        moved_ += moved;
        changed_.notify_all();
    }

    mutable std::mutex mutex_;
    std::condition_variable changed_; ///< a share was given up or has moved, or a return has ended
    std::uint64_t taken_ = 0;         ///< being moved, or moved
    std::uint64_t moved_ = 0;         ///< of these, moved
    bool returning_ = false;
};

} // namespace qlean
