// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Big-endian integers, as every number in a QCOW2 file is stored. Nothing else in the project swaps bytes.
#pragma once

#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

namespace qlean {

template <std::unsigned_integral T>
constexpr T swap_bytes(T value) noexcept {
    if constexpr (sizeof(T) == 2)
        return __builtin_bswap16(value);
    else if constexpr (sizeof(T) == 4)
        return __builtin_bswap32(value);
    else if constexpr (sizeof(T) == 8)
        return __builtin_bswap64(value);
    else
        return value;
}

/// Converts between host order and big-endian order (the conversion is its own inverse).
template <std::unsigned_integral T>
constexpr T big_endian(T value) noexcept {
    if constexpr (std::endian::native == std::endian::little)
        return swap_bytes(value);
    else
        return value;
}

/// Reads a big-endian T at byte `at`. The caller has checked that it fits.
template <std::unsigned_integral T>
T load_be(std::span<const std::byte> from, std::size_t at) noexcept {
    T raw;
    std::memcpy(&raw, from.data() + at, sizeof raw);
    return big_endian(raw);
}

/// Writes `value` big-endian at byte `at`. The caller has checked that it fits.
template <std::unsigned_integral T>
void store_be(std::span<std::byte> to, std::size_t at, T value) noexcept {
    const T raw = big_endian(value);
    std::memcpy(to.data() + at, &raw, sizeof raw);
}

} // namespace qlean
