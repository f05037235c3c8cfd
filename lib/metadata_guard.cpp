// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "metadata_guard.h"

#include <new>

namespace qlean {

namespace {

constexpr unsigned offset_bits = 56;

template <class T>
T *zeroed(std::uint64_t count) {
    void *memory = std::calloc(count, sizeof(T));
    if (memory == nullptr)
        throw std::bad_alloc();
    return static_cast<T *>(memory);
}

} // namespace

MetadataGuard::MetadataGuard(unsigned cluster_bits)
    : cluster_bits_(cluster_bits), chunk_count_(std::uint64_t{1} << (offset_bits - cluster_bits - chunk_bits)),
      chunks_owner_(zeroed<std::atomic<Chunk *>>(chunk_count_)), chunks_(chunks_owner_.get()) {}

std::atomic<std::uint64_t> *MetadataGuard::word(HostCluster c) {
    const std::uint64_t i = c.value >> chunk_bits;
    if (i >= chunk_count_)
        return nullptr;
    Chunk *chunk = chunks_[i].load(std::memory_order_acquire);
    if (chunk == nullptr) {
        const std::lock_guard guard(mutex_);
        chunk = chunks_[i].load(std::memory_order_acquire);
        if (chunk == nullptr) {
            made_.emplace_back(zeroed<Chunk>(1));
            chunk = made_.back().get();
            chunks_[i].store(chunk, std::memory_order_release);
        }
    }
    return &chunk->words[word_of(c)];
}

void MetadataGuard::add(HostRun run) {
    for (HostCluster c = run.first; c < run.end(); ++c)
        if (auto *bits = word(c))
            bits->fetch_or(bit_of(c), std::memory_order_relaxed);
}

void MetadataGuard::remove(HostRun run) {
    for (HostCluster c = run.first; c < run.end(); ++c)
        if (has(c))
            word(c)->fetch_and(~bit_of(c), std::memory_order_relaxed);
}

} // namespace qlean
