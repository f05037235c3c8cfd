// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Which host clusters hold the active image's own metadata: header, L1 and L2 tables, refcount table and blocks. An L2
// entry that claims such a cluster for the guest is damage, and writing there would be the end of the image; so every
// entry that is decoded is held against this, and no such cluster is ever made free. A bit per cluster, without a lock
// for readers.
#pragma once

#include "address.h"

#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <vector>

namespace qlean {

class MetadataGuard {
  public:
    explicit MetadataGuard(unsigned cluster_bits);

    bool has(HostCluster c) const {
        const std::uint64_t i = c.value >> chunk_bits;
        if (i >= chunk_count_)
            return false;
        const Chunk *chunk = chunks_[i].load(std::memory_order_acquire);
        return chunk != nullptr && (chunk->words[word_of(c)].load(std::memory_order_relaxed) & bit_of(c)) != 0;
    }
    void add(HostRun run);
    void remove(HostRun run);
    /// The same for whole structures of so many bytes.
    void add(HostOffset at, std::uint64_t bytes) { add(clusters(at, bytes)); }
    void remove(HostOffset at, std::uint64_t bytes) { remove(clusters(at, bytes)); }

  private:
    HostRun clusters(HostOffset at, std::uint64_t bytes) const {
        return {{at.value >> cluster_bits_}, divide_up(bytes, std::uint64_t{1} << cluster_bits_)};
    }

    static constexpr unsigned chunk_bits = 22; ///< clusters of a chunk
    struct Chunk {
        std::atomic<std::uint64_t> words[std::uint64_t{1} << (chunk_bits - 6)];
    };
    struct Free {
        void operator()(void *memory) const { std::free(memory); }
    };
    static std::uint64_t word_of(HostCluster c) { return (c.value & ((std::uint64_t{1} << chunk_bits) - 1)) / 64; }
    static std::uint64_t bit_of(HostCluster c) { return std::uint64_t{1} << c.value % 64; }
    std::atomic<std::uint64_t> *word(HostCluster c);

    const unsigned cluster_bits_;
    // Zeroes that cost no memory until they are written, so that it does not matter how large an image could be.
    std::uint64_t chunk_count_;
    std::unique_ptr<std::atomic<Chunk *>, Free> chunks_owner_;
    std::atomic<Chunk *> *chunks_;
    std::mutex mutex_; // making a chunk
    std::vector<std::unique_ptr<Chunk, Free>> made_;
};

} // namespace qlean
