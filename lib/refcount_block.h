// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Entries of a refcount block, of any width from 1 to 64 bits (docs/interop/qcow2, "Host cluster management"). Pure.
// Widths below a byte are packed from the least significant bit up.
#pragma once

#include "byte_order.h"

#include <cstdint>
#include <span>

namespace qlean {

/// Reads and writes the refcounts in a run of bytes of a refcount block. `order`: log2 of the width in bits.
class RefcountView {
  public:
    RefcountView(std::span<std::byte> bytes, unsigned order) : bytes_(bytes), order_(order) {}

    static std::uint64_t max(unsigned order) {
        return order == 6 ? ~std::uint64_t{0} : (std::uint64_t{1} << (1u << order)) - 1;
    }
    std::size_t size() const { return (bytes_.size() * 8) >> order_; }

    std::uint64_t get(std::size_t i) const {
        switch (order_) {
        case 4:
            return load_be<std::uint16_t>(bytes_, i * 2);
        case 5:
            return load_be<std::uint32_t>(bytes_, i * 4);
        case 6:
            return load_be<std::uint64_t>(bytes_, i * 8);
        case 3:
            return std::to_integer<std::uint8_t>(bytes_[i]);
        default: {
            const unsigned width = 1u << order_, per_byte = 8 / width;
            return std::to_integer<unsigned>(bytes_[i / per_byte]) >> (i % per_byte * width) & ((1u << width) - 1);
        }
        }
    }

    void set(std::size_t i, std::uint64_t value) {
        switch (order_) {
        case 4:
            return store_be(bytes_, i * 2, static_cast<std::uint16_t>(value));
        case 5:
            return store_be(bytes_, i * 4, static_cast<std::uint32_t>(value));
        case 6:
            return store_be(bytes_, i * 8, value);
        case 3:
            bytes_[i] = std::byte(value);
            return;
        default: {
            const unsigned width = 1u << order_, per_byte = 8 / width, shift = i % per_byte * width;
            const unsigned mask = ((1u << width) - 1) << shift;
            const unsigned old = std::to_integer<unsigned>(bytes_[i / per_byte]);
            bytes_[i / per_byte] = std::byte((old & ~mask) | (static_cast<unsigned>(value) << shift & mask));
        }
        }
    }

  private:
    std::span<std::byte> bytes_;
    unsigned order_;
};

} // namespace qlean
