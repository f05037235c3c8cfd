// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The header of an image (docs/interop/qcow2, "Header", "Header extensions", "Feature name table"): decoding,
// judging, encoding. Pure: no I/O. A Header that parse() returns is self-consistent; its offsets are only known to
// be aligned and in range, not to point at anything sensible.
#pragma once

#include "address.h"
#include "l2_entry.h"

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace qlean {

struct HeaderExtension {
    std::uint32_t type;
    std::vector<std::byte> data;
    std::uint64_t at = 0; ///< where the data is in the file; 0: not known
};

struct Header {
    static constexpr std::uint32_t magic = 0x514649fb;
    static constexpr std::uint64_t max_l1_bytes = 32 * 1024 * 1024;
    static constexpr std::uint64_t max_refcount_table_bytes = 8 * 1024 * 1024;
    /// Extended L2 entries need clusters of this size or larger.
    static constexpr std::uint64_t min_extended_cluster = 16384;
    /// Bytes a reader needs for parse(): the largest cluster, since extensions end within the first one.
    static constexpr std::size_t max_bytes = 2 * 1024 * 1024;

    // Incompatible features.
    static constexpr std::uint64_t incompatible_dirty = 1u << 0;
    static constexpr std::uint64_t incompatible_corrupt = 1u << 1;
    static constexpr std::uint64_t incompatible_data_file = 1u << 2;
    static constexpr std::uint64_t incompatible_compression = 1u << 3;
    static constexpr std::uint64_t incompatible_extended_l2 = 1u << 4;
    // Autoclear features.
    static constexpr std::uint64_t autoclear_bitmaps = 1u << 0;
    static constexpr std::uint64_t autoclear_data_file_raw = 1u << 1;

    // Encryption methods.
    static constexpr std::uint32_t crypt_none = 0;
    static constexpr std::uint32_t crypt_aes = 1;
    static constexpr std::uint32_t crypt_luks = 2;

    // Header extensions.
    static constexpr std::uint32_t extension_end = 0;
    static constexpr std::uint32_t extension_backing_format = 0xe2792aca;
    static constexpr std::uint32_t extension_feature_names = 0x6803f857;
    static constexpr std::uint32_t extension_bitmaps = 0x23852875;
    static constexpr std::uint32_t extension_encryption = 0x0537be77;
    static constexpr std::uint32_t extension_data_file = 0x44415441;

    unsigned version = 3;
    std::string backing_file;
    unsigned cluster_bits = 16;
    std::uint64_t virtual_size = 0;
    std::uint32_t crypt_method = 0;
    std::uint32_t l1_size = 0; ///< entries
    HostOffset l1_offset;
    HostOffset refcount_table_offset;
    std::uint32_t refcount_table_clusters = 0;
    std::uint32_t snapshot_count = 0;
    HostOffset snapshots_offset;
    std::uint64_t incompatible = 0;
    std::uint64_t compatible = 0;
    std::uint64_t autoclear = 0;
    unsigned refcount_order = 4;
    std::uint32_t header_length = 104;
    std::uint8_t compression_type = 0;
    std::vector<HeaderExtension> extensions;

    bool has_subclusters() const { return incompatible & incompatible_extended_l2; }
    bool has_data_file() const { return incompatible & incompatible_data_file; }
    Geometry geometry() const { return {cluster_bits, refcount_order, virtual_size, has_subclusters()}; }
    EntryFormat entry_format() const { return {cluster_bits, version, has_subclusters(), has_data_file()}; }
    /// Persistent bitmaps are to be relied on; otherwise their extension is to be ignored.
    bool bitmaps_count() const { return version >= 3 && (autoclear & autoclear_bitmaps); }
    bool has_unknown_extension() const;
    const HeaderExtension *extension(std::uint32_t type) const;

    /// Decodes `bytes`, the start of the file (all of it up to max_bytes). Throws Error naming `file`.
    static Header parse(std::span<const std::byte> bytes, const std::string &file);

    /// Throws Error with one sentence if the image needs an incompatible feature, a compression or an encryption that
    /// nobody knows, or is not of one mind about them.
    void require_known(const std::string &file) const;
    /// Throws Error with one sentence if the image uses a feature that is not handled. The marks "dirty" and "corrupt"
    /// are not features.
    void require_supported(const std::string &file) const;

    /// Rewrites the fixed fields in `sector`, the first 512 bytes of the file, keeping every byte it does not know.
    void update(std::span<std::byte> sector) const;
    /// Bytes of the fixed fields, from the start of the file.
    std::size_t fixed_length() const;
    /// Fixed fields and extensions of a new image.
    std::vector<std::byte> encode() const;
};

} // namespace qlean
