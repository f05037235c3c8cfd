// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "sparse_bits.h"

#include "address.h"

#include <new>

namespace qlean {

SparseBits::SparseBits(std::uint64_t count)
    : branch_count_(divide_up(count, branch_bits)),
      branches_(std::make_unique<std::atomic<Branch *>[]>(branch_count_)) {}

template <class T>
T *SparseBits::make(std::atomic<T *> &at) {
    if (T *there = at.load(std::memory_order_acquire))
        return there;
    const Lock guard(mutex_);
    if (T *there = at.load(std::memory_order_acquire))
        return there;
    made_.emplace_back(std::calloc(1, sizeof(T)));
    if (!made_.back()) {
        made_.pop_back();
        throw std::bad_alloc();
    }
    T *made = static_cast<T *>(made_.back().get());
    at.store(made, std::memory_order_release);
    return made;
}

bool SparseBits::set(std::uint64_t i) {
    if (i / branch_bits >= branch_count_)
        return false;
    Branch *branch = make(branches_[i / branch_bits]);
    Chunk *chunk = make(branch->chunks[i % branch_bits / chunk_bits]);
    return chunk->words[word_of(i)].fetch_or(bit_of(i)) & bit_of(i);
}

void SparseBits::clear(std::uint64_t i) {
    if (has(i))
        find(i)->words[word_of(i)].fetch_and(~bit_of(i));
}

} // namespace qlean
