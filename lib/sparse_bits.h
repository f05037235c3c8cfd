// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// A bit for each of very many things, of which few are set and these close together: memory is used for what was
// touched. No lock for readers, nor for setting and clearing.
#pragma once

#include "thread_safety.h"

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

namespace qlean {

class SparseBits {
  public:
    /// Bits [0, count). Those beyond are never set.
    explicit SparseBits(std::uint64_t count);

    bool has(std::uint64_t i) const {
        const Chunk *chunk = find(i);
        return chunk != nullptr && (chunk->words[word_of(i)].load(std::memory_order_acquire) & bit_of(i)) != 0;
    }
    /// True if it was set before.
    bool set(std::uint64_t i);
    void clear(std::uint64_t i);

  private:
    static constexpr std::uint64_t chunk_bits = std::uint64_t{1} << 22;
    static constexpr std::uint64_t branch_chunks = 4096;
    static constexpr std::uint64_t branch_bits = chunk_bits * branch_chunks;
    struct Chunk {
        std::atomic<std::uint64_t> words[chunk_bits / 64];
    };
    struct Branch {
        std::atomic<Chunk *> chunks[branch_chunks];
    };
    struct Free {
        void operator()(void *memory) const { std::free(memory); }
    };
    static std::uint64_t word_of(std::uint64_t i) { return i % chunk_bits / 64; }
    static std::uint64_t bit_of(std::uint64_t i) { return std::uint64_t{1} << i % 64; }

    Chunk *find(std::uint64_t i) const {
        if (i / branch_bits >= branch_count_)
            return nullptr;
        const Branch *branch = branches_[i / branch_bits].load(std::memory_order_acquire);
        return branch == nullptr ? nullptr
                                 : branch->chunks[i % branch_bits / chunk_bits].load(std::memory_order_acquire);
    }
    /// What `at` points to, made if need be.
    template <class T>
    T *make(std::atomic<T *> &at);

    // All of it begins as zeroes, which cost no memory until they are written: what could be there hardly matters.
    std::uint64_t branch_count_;
    std::unique_ptr<std::atomic<Branch *>[]> branches_;
    Mutex mutex_; // making a branch or a chunk
    std::vector<std::unique_ptr<void, Free>> made_ PROTECTED_BY(mutex_);
};

} // namespace qlean
