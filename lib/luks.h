// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The LUKS header inside an encrypted image: where it is, and how a passphrase opens it. libcryptsetup reads it, from
// a copy in memory; nothing here ever writes one.
#pragma once

#include "address.h"
#include "file.h"
#include "header.h"
#include "sector_cipher.h"

#include <cstddef>
#include <optional>
#include <span>
#include <string>

namespace qlean {

struct LuksPointer {
    HostOffset at;
    std::uint64_t length = 0;

    /// More than any LUKS header with eight key slots needs.
    static constexpr std::uint64_t max_length = 16 * 1024 * 1024;

    /// Decodes the header extension. Throws Error (bad_image) for a place where no header can be.
    static LuksPointer parse(std::span<const std::byte> extension, const Geometry &geometry, const std::string &file);
    /// The clusters it occupies.
    HostRun run(const Geometry &geometry) const { return {geometry.cluster_of(at), geometry.clusters_for(length)}; }
};

/// The header of an image that is encrypted with LUKS, and how to read its clusters.
struct LuksUnlocked {
    HostRun header;
    SectorCipher cipher;
};

/// Nothing, for an image that is not encrypted. Throws Error also for one that is encrypted in another way, that
/// contradicts itself, or that needs a passphrase (`passphrase` may be null).
std::optional<LuksUnlocked> unlock_image(File &file, const Header &header, const Secret *passphrase);

/// Opens `header` with `passphrase`. Throws Error: denied for a wrong passphrase, bad_image for no valid header,
/// unsupported for a cipher that we do not have.
SectorCipher unlock_luks(std::span<const std::byte> header, const Secret &passphrase, const std::string &file);

} // namespace qlean
