// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Whether memory holds nothing but zeroes.
#pragma once

#include <cstddef>
#include <cstring>
#include <span>

namespace qlean {

inline bool all_zero(std::span<const std::byte> bytes) {
    if (bytes.empty())
        return true;
    // Each byte equals its predecessor and the first is zero: memcmp does the walking, as fast as the machine can.
    return bytes[0] == std::byte{0} && std::memcmp(bytes.data(), bytes.data() + 1, bytes.size() - 1) == 0;
}

} // namespace qlean
