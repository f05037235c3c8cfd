// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// One alteration of an image: a field of one of its structures (or any bytes) gets another value, a likely one: a
// neighbour, another structure's address, an entry of another table, one bit more or less; or the file gets another
// length.
#pragma once

#include "lib/byte_order.h"
#include "lib/header.h"
#include "tests/fuzz/image_cases.h"
#include "tests/fuzz/input.h"
#include "tests/fuzz/memory_file.h"

namespace qlean::fuzz {

inline std::uint64_t get_field(const MemoryDisk &disk, std::uint64_t at, unsigned width) {
    std::uint64_t value = 0;
    for (unsigned i = 0; i < width; ++i)
        value = value << 8 | (at + i < disk.bytes.size() ? std::to_integer<std::uint64_t>(disk.bytes[at + i]) : 0);
    return value;
}

inline void set_field(MemoryDisk &disk, std::uint64_t at, unsigned width, std::uint64_t value) {
    for (unsigned i = 0; i < width; ++i)
        if (at + i < disk.bytes.size())
            disk.bytes[at + i] = std::byte(value >> 8 * (width - 1 - i));
}

inline void change_length(MemoryDisk &disk, Input &in) {
    constexpr std::uint64_t holes = 64 * 1024 * 1024;
    switch (in.below(4)) {
    case 0:
        disk.bytes.resize(std::min<std::uint64_t>(disk.bytes.size(), in.number(3)));
        disk.length = disk.bytes.size();
        break;
    case 1:
        disk.length += in.number(4) % holes;
        break;
    case 2:
        disk.length += holes;
        break;
    default: // more than can be, whatever the size of a cluster
        disk.length = std::uint64_t{1} << (53 + in.below(10));
    }
}

inline void change(MemoryDisk &disk, const ImageCase &from, Input &in) {
    const std::uint64_t where = in.byte();
    if (where == 0xff)
        return change_length(disk, in);
    const Region region = where == 0xfe ? Region{0, from.bytes.size()} : from.regions[where % from.regions.size()];
    const unsigned width = 1u << in.below(4);
    const std::uint64_t at = region.at + round_down(in.below(region.length, 3), width);
    std::uint64_t value = get_field(disk, at, width);
    const auto other = [&] { return from.regions[in.below(from.regions.size())].at; };
    switch (in.below(8)) {
    case 0:
        value = in.number(width);
        break;
    case 1:
        value ^= std::uint64_t{1} << in.below(8 * width);
        break;
    case 2:
        value += in.byte() - 128;
        break;
    case 3: // another structure, with flags
        value = other() | in.byte() << 56;
        break;
    case 4:
        value = ~std::uint64_t{0} >> in.below(64);
        break;
    case 5: { // what some other field has
        const Region one = from.regions[in.below(from.regions.size())];
        value = get_field(disk, one.at + round_down(in.below(one.length, 2), width), width);
        break;
    }
    case 6: // some cluster, with flags
        value = in.number(2) * 512 | in.byte() << 56;
        break;
    default:
        value = std::uint64_t{1} << in.below(64);
    }
    set_field(disk, at, width, value);
}

/// The header names a file of this host that is not the one of the sound image: nothing to open here. fuzz-decoders
/// reads such names.
inline bool names_other_file(const MemoryDisk &disk, const ImageCase &from) {
    const std::span<const std::byte> bytes = disk.bytes, sound = from.bytes;
    const std::uint64_t at = bytes.size() >= 20 ? load_be<std::uint64_t>(bytes, 8) : 0;
    if (at == 0)
        return false;
    const std::uint64_t length = load_be<std::uint32_t>(bytes, 16);
    return at != load_be<std::uint64_t>(sound, 8) || length != load_be<std::uint32_t>(sound, 16) ||
           bytes.size() < at + length || !std::ranges::equal(bytes.subspan(at, length), sound.subspan(at, length));
}

} // namespace qlean::fuzz
