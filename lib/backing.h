// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// What lies below an image: the disk that a guest sees where the image has nothing of its own (docs/interop/qcow2,
// "Backing files"). It is never written. Offsets and lengths are bytes of the guest's disk. Any thread.
#pragma once

#include "address.h"

#include <cstddef>
#include <cstdint>
#include <span>

namespace qlean {

class Backing {
  public:
    virtual ~Backing() = default;

    /// Bytes; what lies beyond reads as zeroes.
    virtual std::uint64_t size() const = 0;
    /// [at, at + into.size()) may reach beyond size().
    virtual void read(std::span<std::byte> into, GuestOffset at) = 0;

    struct Extent {
        std::uint64_t length; ///< not 0
        bool allocated, zero; ///< as Image::Extent
    };
    /// What the range begins with; `length` > 0, and the answer is not longer.
    virtual Extent extent(GuestOffset at, std::uint64_t length) = 0;
    virtual void prefetch(GuestOffset at, std::uint64_t length) = 0;
};

} // namespace qlean
