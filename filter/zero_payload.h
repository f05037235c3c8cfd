// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Is a buffer all zeroes? Asked of every guest write that fills at least one granule, so a buffer of ordinary data must
// be turned away after a look at its first bytes.

#pragma once

#include <cstddef>
#include <cstring>

namespace qlean {

inline bool is_all_zero(const void *buffer, std::size_t length) {
    static constexpr std::size_t probe = 16;
    static constexpr unsigned char zeroes[probe] = {};
    const auto *bytes = static_cast<const unsigned char *>(buffer);
    if (length <= probe)
        return std::memcmp(bytes, zeroes, length) == 0;
    // Data often begins with a zeroed header or ends in padding: look at both ends before reading the whole.
    if (std::memcmp(bytes, zeroes, probe) != 0 || std::memcmp(bytes + length - probe, zeroes, probe) != 0)
        return false;
    // Every byte equals the one 16 places before it, and the first 16 are zero.
    return std::memcmp(bytes, bytes + probe, length - probe) == 0;
}

} // namespace qlean
