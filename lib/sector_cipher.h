// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Disk encryption of 512-byte sectors, each by itself, with an initialisation vector that follows from its number:
// AES in XTS or CBC mode, as LUKS headers name them. The only place that talks to libcrypto. Safe to use from any
// number of threads at once.
#pragma once

#include "secret.h"

#include <cstdint>
#include <memory>
#include <span>
#include <string>

namespace qlean {

class SectorCipher {
  public:
    static constexpr std::size_t sector = 512;

    /// As the constructor, before there is a key.
    static void require_known(const std::string &name, const std::string &mode, std::size_t key_bytes,
                              const std::string &file);
    /// `name` and `mode` as in a LUKS header ("aes", "xts-plain64"). Throws Error (unsupported) that names what it
    /// cannot do; `file` is for that sentence.
    SectorCipher(const std::string &name, const std::string &mode, Secret key, const std::string &file);
    ~SectorCipher();
    SectorCipher(SectorCipher &&) noexcept;

    /// Whole sectors, of which the first is number `first`; `from` and `into` are of one size and may be the same
    /// memory.
    void encrypt(std::span<const std::byte> from, std::span<std::byte> into, std::uint64_t first) const;
    void decrypt(std::span<const std::byte> from, std::span<std::byte> into, std::uint64_t first) const;

  private:
    struct Parts;
    std::unique_ptr<Parts> parts_;
};

} // namespace qlean
