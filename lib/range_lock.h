// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The lock over guest clusters. Shared holders of a guest cluster may rely on its mapping; whoever changes the
// mapping holds it exclusively. It is the only lock held across data I/O.
//
// Striped: guest ranges of one unit (a cluster, or 64 KiB where clusters are smaller) hash to stripes. A guard takes
// its stripes sorted and each once, so two guards never deadlock. A thread holds at most one guard per image.
#pragma once

#include "address.h"
#include "rw_lock.h"

#include <memory>
#include <mutex>
#include <utility>

namespace qlean {

class RangeLock {
  public:
    static constexpr std::uint64_t stripe_count = 4096;

    explicit RangeLock(const Geometry &geometry);

    /// Waits until everybody who holds a range now has let go of it. Nobody is kept out.
    void drain();

    /// Guest bytes [at, at + length), length > 0.
    class [[nodiscard]] Shared;
    class [[nodiscard]] Exclusive;

  private:
    /// Up to two ascending runs of stripe numbers: [first, end) after [0, wrapped).
    struct Stripes {
        std::uint64_t wrapped = 0, first = 0, end = 0;
        template <class F>
        void each(F &&f) const {
            for (std::uint64_t i = 0; i < wrapped; ++i)
                f(i);
            for (std::uint64_t i = first; i < end; ++i)
                f(i);
        }
    };

    Stripes stripes(GuestOffset at, std::uint64_t length) const;
    bool try_lock(const Stripes &stripes);

    unsigned unit_bits_;
    std::unique_ptr<RwLock[]> stripes_; // close together: all of them stay in a processor's cache
};

class RangeLock::Shared {
  public:
    Shared(RangeLock &lock, GuestOffset at, std::uint64_t length) : lock_(lock), held_(lock.stripes(at, length)) {
        held_.each([&](std::uint64_t i) { lock_.stripes_[i].lock_shared(); });
    }
    ~Shared() {
        held_.each([&](std::uint64_t i) { lock_.stripes_[i].unlock_shared(); });
    }
    Shared(const Shared &) = delete;
    Shared &operator=(const Shared &) = delete;

  private:
    RangeLock &lock_;
    Stripes held_;
};

class RangeLock::Exclusive {
  public:
    Exclusive(RangeLock &lock, GuestOffset at, std::uint64_t length) : lock_(lock), held_(lock.stripes(at, length)) {
        held_.each([&](std::uint64_t i) { lock_.stripes_[i].lock(); });
    }
    /// Takes the range only if nobody has to be waited for; owns() says whether it did.
    Exclusive(RangeLock &lock, GuestOffset at, std::uint64_t length, std::try_to_lock_t)
        : lock_(lock), held_(lock.stripes(at, length)), owns_(lock.try_lock(held_)) {}
    ~Exclusive() {
        if (owns_)
            held_.each([&](std::uint64_t i) { lock_.stripes_[i].unlock(); });
    }
    Exclusive(const Exclusive &) = delete;
    Exclusive &operator=(const Exclusive &) = delete;
    bool owns() const { return owns_; }

  private:
    RangeLock &lock_;
    Stripes held_;
    bool owns_ = true;
};

} // namespace qlean
