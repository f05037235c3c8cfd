// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The most memory that may be taken while one of these lives: the allocation that goes beyond it ends the process, so
// that its stack is seen. Only in a process that the address sanitizer watches. One at a time.
#pragma once

#include <cstdint>

namespace qlean::fuzz {

/// As lib/README.md says, for one image without a backing file, a cache of 64 KiB and requests of up to 1 MiB: what
/// each open image takes; tables that are in the file, which holds at most `content` bytes beside holes, and a repair
/// may make the file that long; and what is counted by cluster.
constexpr std::uint64_t bound_for_image(std::uint64_t length, std::uint64_t content) {
    constexpr std::uint64_t always = 24 * 1024 * 1024, smallest_cluster = 512;
    return always + 8 * content + 6 * (length / smallest_cluster);
}

class MemoryBound {
  public:
    explicit MemoryBound(std::uint64_t bytes);
    ~MemoryBound();
    MemoryBound(const MemoryBound &) = delete;
    MemoryBound &operator=(const MemoryBound &) = delete;
};

} // namespace qlean::fuzz
