// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// What lies below an image: the disk that a guest sees where the image has nothing of its own (docs/interop/qcow2,
// "Backing files"). It is never written. Offsets and lengths are bytes of the guest's disk. Any thread.
#pragma once

#include "address.h"
#include "file.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace qlean {

struct Header;
class Secret;

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
    /// What the range consists of, from `at` on: all of it, or its beginning in `most` extents. `length` > 0.
    virtual std::vector<Extent> extents(GuestOffset at, std::uint64_t length, std::size_t most) = 0;
    /// The file, for messages; and how many there are from this one down.
    virtual const std::string &name() const = 0;
    virtual unsigned depth() const = 0;
    /// Asks the host to read the range ahead.
    virtual void prefetch(GuestOffset at, std::uint64_t length) = 0;
};

/// An image of a chain, while what is below it is opened: who named it, and which file it is.
struct ChainLink {
    const ChainLink *above; ///< null for the image that is served
    const File &file;
};

/// Opens what `header`, of `file`, names below it, read-only and with QEMU's shared locks; null if it names nothing.
/// `cache_bytes`: for L2 tables of all that lies below. `passphrase`: for what of it is encrypted; may be null. Throws
/// Error for a file that cannot be opened, a chain that does not end, or what is neither raw nor QCOW2.
std::unique_ptr<Backing> open_backing(const Header &header, const File &file, const ChainLink *above,
                                      std::uint64_t cache_bytes, const std::shared_ptr<const Secret> &passphrase);

} // namespace qlean
