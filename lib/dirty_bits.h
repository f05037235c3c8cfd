// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Bits that were set since something began, in pages that come into being when their first bit is set: what a dirty
// bitmap learns while the image is open. Setting takes no lock, from any number of threads; nothing else runs while
// the bits are read. Bit i is bit i % 8 of byte i / 8, as in the file.
#pragma once

#include "address.h"

#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

namespace qlean {

class DirtyBits {
  public:
    explicit DirtyBits(std::uint64_t bits)
        : bits_(bits), pages_count_(divide_up(bits, page_bits)),
          pages_(std::make_unique<std::atomic<Page *>[]>(pages_count_)) {}
    DirtyBits(DirtyBits &&) = default;
    ~DirtyBits() {
        for (std::uint64_t p = 0; pages_ && p < pages_count_; ++p)
            delete pages_[p].load(std::memory_order_relaxed);
    }

    /// Sets bits [first, last], as far as there are any.
    void set(std::uint64_t first, std::uint64_t last) {
        last = std::min(last, bits_ - 1);
        for (std::uint64_t w = first / 64; w <= last / 64 && bits_ != 0; ++w) {
            std::uint64_t mask = ~std::uint64_t{0};
            if (w == first / 64)
                mask &= ~std::uint64_t{0} << (first % 64);
            if (w == last / 64)
                mask &= ~std::uint64_t{0} >> (63 - last % 64);
            auto &word = page(w / page_words).words[w % page_words];
            // Mostly they are set already, and the line stays shared between the processors.
            if ((word.load(std::memory_order_relaxed) & mask) != mask)
                word.fetch_or(mask, std::memory_order_relaxed);
        }
    }

    /// Calls f(i) for each piece of `bytes` bytes (a power of two, not less than 512), piece i beginning at byte
    /// i * bytes, in which a bit is set; ascending.
    template <class F>
    void each_touched(std::uint64_t bytes, F &&f) const {
        std::uint64_t next = 0;
        for (std::uint64_t p = 0; p < pages_count_; ++p) {
            const Page *page = pages_[p].load(std::memory_order_relaxed);
            if (!page)
                continue;
            const std::uint64_t step = std::min(bytes, page_bytes);
            for (std::uint64_t within = 0; within < page_bytes; within += step) {
                const std::uint64_t piece = (p * page_bytes + within) / bytes;
                if (piece >= next && any(*page, within, step)) {
                    f(piece);
                    next = piece + 1;
                }
            }
        }
    }

    /// Sets in `bytes`, which begins at byte `at` (a multiple of 512, as its size is), what is set here.
    void merge_into(std::span<std::byte> bytes, std::uint64_t at) const {
        for (std::uint64_t done = 0; done < bytes.size(); done += 8) {
            const std::uint64_t w = (at + done) / 8;
            const Page *page =
                w / page_words < pages_count_ ? pages_[w / page_words].load(std::memory_order_relaxed) : nullptr;
            const std::uint64_t word = page ? page->words[w % page_words].load(std::memory_order_relaxed) : 0;
            for (unsigned i = 0; word != 0 && i < 8; ++i)
                bytes[done + i] |= std::byte(word >> (8 * i) & 0xff);
        }
    }

  private:
    static constexpr std::uint64_t page_bytes = 4096, page_words = page_bytes / 8, page_bits = page_bytes * 8;
    struct Page {
        std::atomic<std::uint64_t> words[page_words] = {};
    };

    Page &page(std::uint64_t p) {
        Page *there = pages_[p].load(std::memory_order_acquire);
        if (there)
            return *there;
        auto made = std::make_unique<Page>();
        if (pages_[p].compare_exchange_strong(there, made.get(), std::memory_order_acq_rel))
            return *made.release();
        return *there;
    }
    static bool any(const Page &page, std::uint64_t from, std::uint64_t bytes) {
        for (std::uint64_t w = from / 8; w < (from + bytes) / 8; ++w)
            if (page.words[w].load(std::memory_order_relaxed) != 0)
                return true;
        return false;
    }

    std::uint64_t bits_;
    std::uint64_t pages_count_;
    std::unique_ptr<std::atomic<Page *>[]> pages_;
};

} // namespace qlean
