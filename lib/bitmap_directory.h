// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Persistent bitmaps as the file has them (docs/interop/qcow2, "Bitmaps extension", "Bitmaps"): the header extension,
// the directory, the words of a bitmap table. Pure: no I/O. What parses is what QEMU accepts, no more: every size is
// bounded, the offsets are aligned, but not known to point at anything sensible.
#pragma once

#include "address.h"

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace qlean {

/// The data of the header extension: where the directory is.
struct BitmapsExtension {
    static constexpr std::size_t bytes = 24;
    /// Where in the data the directory's offset is: 8 bytes, aligned, so that changing it is one write in one sector.
    static constexpr std::size_t offset_at = 16;
    static constexpr std::uint32_t max_bitmaps = 65535;
    static constexpr std::uint64_t max_directory_bytes = std::uint64_t{1024} * max_bitmaps; ///< as in QEMU

    std::uint32_t count = 0;
    std::uint64_t directory_bytes = 0;
    HostOffset directory;

    /// Throws Error naming `file`.
    static BitmapsExtension parse(std::span<const std::byte> data, const Geometry &geometry, const std::string &file);
};

/// One entry of the directory.
struct BitmapEntry {
    static constexpr std::uint32_t flag_in_use = 1u << 0; ///< what is stored is out of date
    static constexpr std::uint32_t flag_auto = 1u << 1;   ///< enabled: whoever writes to the disk marks it here
    static constexpr std::size_t fixed_bytes = 24;        ///< before its extra data and its name
    static constexpr std::size_t max_name_bytes = 1023;
    static constexpr std::uint64_t max_bitmap_bytes = 512 * 1024 * 1024;
    // Where the fields are that change, within the entry: each lies in one sector, for entries are aligned to 8.
    static constexpr std::uint64_t table_at = 0, table_size_at = 8, flags_at = 12;

    std::uint64_t at = 0; ///< of the entry, in bytes from the start of the directory
    HostOffset table;
    std::uint32_t table_size = 0; ///< words, one for each cluster of bits
    std::uint32_t flags = 0;
    unsigned granularity_bits = 0;
    std::string name;

    bool in_use() const { return flags & flag_in_use; }
    /// To be kept up to date: enabled, and what is stored is right.
    bool tracked() const { return (flags & flag_auto) && !in_use(); }
    std::uint64_t table_bytes() const { return std::uint64_t{table_size} * 8; }
    std::uint64_t bits(std::uint64_t disk_bytes) const {
        return divide_up(disk_bytes, std::uint64_t{1} << granularity_bits);
    }
    /// The words that a table for a disk of this size has.
    std::uint64_t words_wanted(const Geometry &geometry) const {
        return geometry.clusters_for(divide_up(bits(geometry.virtual_size()), 8));
    }
};

/// Decodes the directory: exactly `count` entries and nothing else. Throws Error naming `file`.
std::vector<BitmapEntry> parse_bitmap_directory(std::span<const std::byte> bytes, std::uint32_t count,
                                                const Geometry &geometry, const std::string &file);

/// The whole directory, and where it is.
struct BitmapDirectory {
    HostOffset at;
    std::uint64_t bytes = 0;
    std::vector<BitmapEntry> entries;
};

/// A bit in memory for each bit of the bitmaps that are kept up to date: throws Error naming `file` if that is more
/// than 2 GiB, which a guest could fill.
void require_trackable(const BitmapDirectory &directory, const Geometry &geometry, const std::string &file);

/// What a word of a bitmap table says of one cluster of bits.
struct BitmapWord {
    enum class Kind : std::uint8_t { zeroes, ones, stored, damaged };

    Kind kind = Kind::zeroes;
    HostCluster host; ///< for stored

    /// `word` in host byte order.
    static BitmapWord decode(std::uint64_t word, const Geometry &geometry);
};

} // namespace qlean
