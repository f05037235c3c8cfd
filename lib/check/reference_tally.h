// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// How often each host cluster is referred to. One byte of address space a cluster, of which the system gives memory
// only to what is touched: 16 MiB for a TiB of clusters of 64 KiB, whatever the length of a file with holes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <unordered_map>

namespace qlean {

/// Zeroes that cost no memory until they are written.
class LazyBytes {
  public:
    explicit LazyBytes(std::uint64_t size)
        : size_(size),
          bytes_(static_cast<std::uint8_t *>(std::calloc(std::max<std::uint64_t>(size, 1), 1)), &std::free) {
        if (!bytes_)
            throw std::bad_alloc();
    }
    std::uint64_t size() const { return size_; }
    std::uint8_t &operator[](std::uint64_t i) { return bytes_.get()[i]; }
    std::uint8_t operator[](std::uint64_t i) const { return bytes_.get()[i]; }

  private:
    std::uint64_t size_;
    std::unique_ptr<std::uint8_t, decltype(&std::free)> bytes_;
};

class ReferenceTally {
  public:
    /// For clusters below `capacity`, with refcounts of at most `max`.
    ReferenceTally(std::uint64_t capacity, std::uint64_t max) : few_(capacity), max_(max) {}

    std::uint64_t capacity() const { return few_.size(); }
    /// What a refcount can say of it.
    std::uint64_t of(std::uint64_t c) const { return std::min(exact(c), max_); }
    std::uint64_t exact(std::uint64_t c) const {
        if (c >= few_.size())
            return 0;
        return few_[c] < many ? few_[c] : many_.at(c);
    }
    /// Adds `times` references; gives how many of them are beyond what a refcount can say.
    std::uint64_t add(std::uint64_t c, std::uint64_t times) {
        const std::uint64_t before = exact(c), after = before + std::min(times, ~before);
        set(c, after);
        return (after - std::min(after, max_)) - (before - std::min(before, max_));
    }
    void set(std::uint64_t c, std::uint64_t count) {
        few_[c] = static_cast<std::uint8_t>(std::min(count, many));
        if (count >= many)
            many_[c] = count;
    }

  private:
    static constexpr std::uint64_t many = 255;
    LazyBytes few_;
    std::unordered_map<std::uint64_t, std::uint64_t> many_;
    std::uint64_t max_;
};

} // namespace qlean
