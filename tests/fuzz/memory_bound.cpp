// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "tests/fuzz/memory_bound.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <sanitizer/allocator_interface.h>

namespace qlean::fuzz {

namespace {

std::atomic<bool> counting{false};
std::atomic<std::int64_t> taken{0}, most{0};

void has_taken(const volatile void *, std::size_t size) {
    if (!counting || (taken += static_cast<std::int64_t>(size)) <= most)
        return;
    counting = false; // what reports this allocates as well
    std::fprintf(stderr, "WRONG: %zu bytes more are taken, which makes it more than the %lld that are the bound\n",
                 size, static_cast<long long>(most));
    std::abort();
}

void has_given(const volatile void *memory) {
    if (counting && memory != nullptr)
        taken -= static_cast<std::int64_t>(__sanitizer_get_allocated_size(memory));
}

} // namespace

MemoryBound::MemoryBound(std::uint64_t bytes) {
    static const int hooked = __sanitizer_install_malloc_and_free_hooks(has_taken, has_given);
    if (hooked == 0)
        std::abort();
    taken = 0;
    most = static_cast<std::int64_t>(bytes);
    counting = true;
}

MemoryBound::~MemoryBound() { counting = false; }

} // namespace qlean::fuzz
