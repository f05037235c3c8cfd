// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The codecs of compressed clusters, and their descriptors (docs/interop/qcow2, "Compressed Clusters Descriptor").
// Pure: no I/O, no state. Whatever the bytes are, a decoder reads no byte outside of what it is given, writes none
// outside of the cluster, and takes a bounded amount of memory.
//
// A descriptor counts sectors of 512 bytes: it says where an extent begins to the byte, but its end only to the sector.
// The exact length is known to the codec alone.
#pragma once

#include "l2_entry.h"

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

namespace qlean {

/// As the header's compression_type.
enum class Compression : std::uint8_t {
    deflate = 0, ///< raw deflate, written with a window of 12 bits
    zstd = 1,
};

namespace compression {

constexpr std::uint64_t sector = 512;

/// The most bytes an extent can be said to have.
constexpr std::uint64_t max_length(unsigned cluster_bits) { return std::uint64_t{2} << cluster_bits; }

/// The descriptor (as Mapping::bits) of an extent of exactly `length` bytes at `at`; none if the format has no way to
/// say it.
std::optional<std::uint64_t> describe(HostOffset at, std::uint64_t length, unsigned cluster_bits);

struct Result {
    bool filled = false; ///< every byte of the cluster was produced
    /// Bytes of the input that mean something; none if the end could not be told. What follows is of no use.
    std::optional<std::size_t> length;
};
/// Decompresses `from` into exactly `cluster`. Nothing follows from the input's length but that it suffices.
Result decompress(Compression type, std::span<const std::byte> from, std::span<std::byte> cluster);

} // namespace compression

} // namespace qlean
