// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "bitmap_directory.h"

#include "byte_order.h"
#include "error.h"

#include <unordered_set>

namespace qlean {

namespace {

constexpr unsigned min_granularity_bits = 9, max_granularity_bits = 31;
constexpr std::uint8_t type_dirty_tracking = 1;
constexpr std::uint64_t max_file_offset = std::uint64_t{1} << 56;

constexpr std::uint64_t word_ones = 1;
constexpr std::uint64_t word_offset = 0x00ff'ffff'ffff'fe00;

void require_valid(const BitmapEntry &entry, std::uint8_t type, const Geometry &geometry, const std::string &file) {
    const auto damaged = [&](const char *what) {
        throw_bad_image("'{}' is damaged: its bitmap '{}' has {}; see 'qemu-img check'", file, entry.name, what);
    };
    if (type != type_dirty_tracking)
        damaged("an unknown type");
    if (entry.flags & ~(BitmapEntry::flag_in_use | BitmapEntry::flag_auto))
        damaged("unknown flags");
    if (entry.granularity_bits < min_granularity_bits || entry.granularity_bits > max_granularity_bits)
        damaged("an impossible granularity");
    if (entry.table_size == 0 || entry.table_size > BitmapEntry::max_bitmap_bytes / geometry.cluster_size())
        damaged("a table of impossible size");
    if (entry.table.value == 0 || entry.table.value % geometry.cluster_size() != 0 ||
        entry.table.value > max_file_offset - entry.table_bytes())
        damaged("its table at an impossible offset");
    // One that is in use may be left over from before the disk was resized.
    if (!entry.in_use() && entry.table_size != entry.words_wanted(geometry))
        damaged("a table of the wrong size for the disk");
}

} // namespace

BitmapsExtension BitmapsExtension::parse(std::span<const std::byte> data, const Geometry &geometry,
                                         const std::string &file) {
    if (data.size() != bytes)
        throw_bad_image("'{}' is damaged: its bitmaps header extension has {} bytes instead of {}", file, data.size(),
                        bytes);
    BitmapsExtension e;
    e.count = load_be<std::uint32_t>(data, 0);
    e.directory_bytes = load_be<std::uint64_t>(data, 8);
    e.directory = {load_be<std::uint64_t>(data, offset_at)};
    if (load_be<std::uint32_t>(data, 4) != 0)
        throw_bad_image("'{}' is damaged: a reserved field of its bitmaps header extension is set", file);
    if (e.count == 0 || e.count > max_bitmaps)
        throw_bad_image("'{}' is damaged: {} bitmaps are impossible", file, e.count);
    if (e.directory_bytes == 0 || e.directory_bytes > max_directory_bytes)
        throw_bad_image("'{}' is damaged: a bitmap directory of {} bytes is impossible", file, e.directory_bytes);
    if (e.directory.value == 0 || e.directory.value % geometry.cluster_size() != 0 ||
        e.directory.value > max_file_offset)
        throw_bad_image("'{}' is damaged: its bitmap directory is at the impossible offset {:#x}", file,
                        e.directory.value);
    return e;
}

std::vector<BitmapEntry> parse_bitmap_directory(std::span<const std::byte> bytes, std::uint32_t count,
                                                const Geometry &geometry, const std::string &file) {
    const auto broken = [&](const std::string &what) {
        throw_bad_image("'{}' is damaged: its bitmap directory {}; see 'qemu-img check'", file, what);
    };
    std::vector<BitmapEntry> entries;
    std::unordered_set<std::string> names;
    for (std::size_t at = 0; at < bytes.size();) {
        if (bytes.size() - at < BitmapEntry::fixed_bytes)
            broken("ends within an entry");
        if (entries.size() == count)
            broken("has more entries than its header says");
        BitmapEntry e;
        e.at = at;
        e.table = {load_be<std::uint64_t>(bytes, at + BitmapEntry::table_at)};
        e.table_size = load_be<std::uint32_t>(bytes, at + BitmapEntry::table_size_at);
        e.flags = load_be<std::uint32_t>(bytes, at + BitmapEntry::flags_at);
        const auto type = std::to_integer<std::uint8_t>(bytes[at + 16]);
        e.granularity_bits = std::to_integer<std::uint8_t>(bytes[at + 17]);
        const std::size_t name_size = load_be<std::uint16_t>(bytes, at + 18);
        const auto extra = load_be<std::uint32_t>(bytes, at + 20);
        if (extra != 0)
            broken("has an entry with extra data, which nobody can interpret");
        const std::size_t length = round_up(BitmapEntry::fixed_bytes + name_size, 8);
        if (name_size > BitmapEntry::max_name_bytes || length > bytes.size() - at)
            broken("has an entry that does not fit");
        e.name.assign(reinterpret_cast<const char *>(bytes.data() + at + BitmapEntry::fixed_bytes), name_size);
        require_valid(e, type, geometry, file);
        if (!names.insert(e.name).second)
            broken(fmt::format("has two bitmaps called '{}'", e.name));
        entries.push_back(std::move(e));
        at += length;
    }
    if (entries.size() != count)
        broken(fmt::format("has {} entries, but its header says {}", entries.size(), count));
    return entries;
}

void require_trackable(const BitmapDirectory &directory, const Geometry &geometry, const std::string &file) {
    constexpr std::uint64_t most = std::uint64_t{2} << 30;
    std::uint64_t bytes = 0;
    for (const BitmapEntry &e : directory.entries)
        if (e.tracked())
            bytes += divide_up(e.bits(geometry.virtual_size()), 8);
    if (bytes > most)
        throw Error(Error::Kind::unsupported, ENOTSUP,
                    fmt::format("'{}' has enabled bitmaps of {} MiB, and no more than {} MiB can be kept up to date; "
                                "disable some with 'qemu-img bitmap --disable', or open it read-only",
                                file, bytes >> 20, most >> 20));
}

BitmapWord BitmapWord::decode(std::uint64_t word, const Geometry &geometry) {
    const std::uint64_t offset = word & word_offset;
    if ((word & ~(word_ones | word_offset)) != 0 || offset % geometry.cluster_size() != 0 ||
        (offset != 0 && (word & word_ones)))
        return {Kind::damaged, {}};
    if (offset == 0)
        return {word & word_ones ? Kind::ones : Kind::zeroes, {}};
    return {Kind::stored, geometry.cluster_of(HostOffset{offset})};
}

} // namespace qlean
