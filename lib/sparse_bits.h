// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// A bit for each of very many things, of which few are set and these close together: memory is used for what was
// touched. No lock for readers, nor for setting and clearing.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <vector>

namespace qlean {

class SparseBits {
  public:
    /// Bits [0, count). Those beyond are never set.
    explicit SparseBits(std::uint64_t count);

    bool has(std::uint64_t i) const {
        if (i / chunk_bits >= chunk_count_)
            return false;
        const Chunk *chunk = chunks_[i / chunk_bits].load(std::memory_order_acquire);
        return chunk != nullptr && (chunk->words[word_of(i)].load(std::memory_order_relaxed) & bit_of(i)) != 0;
    }
    /// True if it was set before.
    bool set(std::uint64_t i);
    void clear(std::uint64_t i);

  private:
    static constexpr std::uint64_t chunk_bits = std::uint64_t{1} << 22;
    struct Chunk {
        std::atomic<std::uint64_t> words[chunk_bits / 64];
    };
    struct Free {
        void operator()(void *memory) const { std::free(memory); }
    };
    static std::uint64_t word_of(std::uint64_t i) { return i % chunk_bits / 64; }
    static std::uint64_t bit_of(std::uint64_t i) { return std::uint64_t{1} << i % 64; }

    // Zeroes that cost no memory until they are written, so that it does not matter how many there could be.
    std::uint64_t chunk_count_;
    std::unique_ptr<std::atomic<Chunk *>, Free> chunks_owner_;
    std::atomic<Chunk *> *chunks_;
    std::mutex mutex_; // making a chunk
    std::vector<std::unique_ptr<Chunk, Free>> made_;
};

} // namespace qlean
