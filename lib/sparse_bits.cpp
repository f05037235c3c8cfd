// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "sparse_bits.h"

#include "address.h"

#include <new>

namespace qlean {

namespace {

template <class T>
T *zeroed(std::uint64_t count) {
    void *memory = std::calloc(count, sizeof(T));
    if (memory == nullptr)
        throw std::bad_alloc();
    return static_cast<T *>(memory);
}

} // namespace

SparseBits::SparseBits(std::uint64_t count)
    : chunk_count_(divide_up(count, chunk_bits)), chunks_owner_(zeroed<std::atomic<Chunk *>>(chunk_count_)),
      chunks_(chunks_owner_.get()) {}

bool SparseBits::set(std::uint64_t i) {
    if (i / chunk_bits >= chunk_count_)
        return false;
    std::atomic<Chunk *> &at = chunks_[i / chunk_bits];
    Chunk *chunk = at.load(std::memory_order_acquire);
    if (chunk == nullptr) {
        const std::lock_guard guard(mutex_);
        chunk = at.load(std::memory_order_acquire);
        if (chunk == nullptr) {
            made_.emplace_back(zeroed<Chunk>(1));
            chunk = made_.back().get();
            at.store(chunk, std::memory_order_release);
        }
    }
    return chunk->words[word_of(i)].fetch_or(bit_of(i)) & bit_of(i);
}

void SparseBits::clear(std::uint64_t i) {
    if (has(i))
        chunks_[i / chunk_bits].load(std::memory_order_acquire)->words[word_of(i)].fetch_and(~bit_of(i));
}

} // namespace qlean
