// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// What refers to clusters besides the disk itself: internal snapshots and persistent bitmaps.
#include "../bitmap_directory.h"
#include "../snapshot_table.h"
#include "checker.h"

#include <map>

namespace qlean {

namespace {

constexpr std::uint64_t wanted_extra_bytes = 16;
constexpr std::uint64_t batch = 65536; ///< words of a table, however long it says it is
constexpr std::uint64_t bitmap_reserved = 0xff00'0000'0000'01fe;

} // namespace

void Checker::count_snapshots() {
    if (header_.snapshot_count > SnapshotTable::max_snapshots)
        return give_up(fmt::format("{} internal snapshots are more than {}", header_.snapshot_count,
                                   SnapshotTable::max_snapshots));
    File &file = source_.file();
    // L1 tables that are the same are counted together: their number may be a lie.
    std::map<std::pair<HostOffset, std::uint32_t>, std::uint64_t> tables;
    std::uint64_t bytes = 0;
    for (std::uint32_t i = 0; i < header_.snapshot_count; ++i) {
        require_going(stop_);
        std::vector<std::byte> fixed(SnapshotTable::fixed_bytes);
        file.read(fixed, header_.snapshots_offset + bytes);
        const HostOffset l1{load_be<std::uint64_t>(fixed, 0)};
        const auto entries = load_be<std::uint32_t>(fixed, 8);
        const std::uint64_t extra = load_be<std::uint32_t>(fixed, 36);
        bytes += round_up(SnapshotTable::fixed_bytes + extra + load_be<std::uint16_t>(fixed, 12) +
                              load_be<std::uint16_t>(fixed, 14),
                          8);
        if (bytes > SnapshotTable::max_bytes)
            return give_up("the snapshot table is impossibly long");
        if (header_.version >= 3 && extra < wanted_extra_bytes)
            corrupt(fmt::format("entry {} of the snapshot table is incomplete", i));
        if (l1.value % cluster_ != 0)
            corrupt(fmt::format("the L1 table of snapshot {} at {:#x} is not at a cluster boundary", i, l1.value));
        else if (std::uint64_t{entries} * 8 > Header::max_l1_bytes)
            corrupt(fmt::format("the L1 table of snapshot {} has the impossible number of {} entries", i, entries));
        else
            ++tables[{l1, entries}];
    }
    std::uint64_t read = 0;
    std::vector<std::uint64_t> words;
    for (const auto &[where, times] : tables) {
        require_going(stop_);
        const auto &[at, entries] = where;
        count(at, std::uint64_t{entries} * 8, "the L1 table of a snapshot", times);
        if (at.value >= source_.length())
            continue;
        read += std::uint64_t{entries} * 8;
        if (read > source_.length() + Header::max_l1_bytes)
            return give_up("the L1 tables of the snapshots overlap");
        words.resize(entries);
        read_words(file, at, words);
        add_tables(words, times, false);
    }
    count(header_.snapshots_offset, bytes, "the snapshot table");
}

void Checker::count_bitmaps() {
    const auto *extension = header_.extension(Header::extension_bitmaps);
    // Without the bit they are out of date, and their clusters leaked.
    if (extension == nullptr || extension->data.size() < BitmapsExtension::bytes ||
        !(header_.autoclear & Header::autoclear_bitmaps))
        return;
    const std::uint64_t bitmaps = load_be<std::uint32_t>(extension->data, 0);
    const std::uint64_t bytes = load_be<std::uint64_t>(extension->data, 8);
    const HostOffset at{load_be<std::uint64_t>(extension->data, 16)};
    count(at, bytes, "the bitmap directory");
    if (bitmaps > BitmapsExtension::max_bitmaps || bytes > BitmapsExtension::max_directory_bytes ||
        at.value > source_.length() || bytes > round_up(source_.length(), cluster_) - at.value)
        return give_up("the bitmap directory is not valid");
    std::vector<std::byte> fixed(BitmapEntry::fixed_bytes);
    std::uint64_t found = 0, read = 0;
    for (std::uint64_t from = 0; from < bytes; ++found) {
        require_going(stop_);
        if (bytes - from < BitmapEntry::fixed_bytes)
            return give_up("the bitmap directory is not valid");
        source_.file().read(fixed, at + from); // names are not looked at
        const std::uint64_t name = load_be<std::uint16_t>(fixed, 18);
        const std::uint64_t extra = load_be<std::uint32_t>(fixed, 20);
        const std::uint64_t length = round_up(BitmapEntry::fixed_bytes + extra + name, 8);
        if (length > bytes - from || name == 0 || name > BitmapEntry::max_name_bytes)
            return give_up(fmt::format("entry {} of the bitmap directory is not valid", found));
        read += count_bitmap_table({load_be<std::uint64_t>(fixed, 0)}, load_be<std::uint32_t>(fixed, 8));
        if (read > source_.length() + cluster_)
            return give_up("the tables of the bitmaps overlap");
        from += length;
    }
    if (found != bitmaps)
        give_up("the bitmap directory has not as many entries as the header says");
}

/// Gives the bytes that it read.
std::uint64_t Checker::count_bitmap_table(HostOffset at, std::uint64_t entries) {
    count(at, entries * 8, "a bitmap table");
    if (at.value >= source_.length() || entries * 8 > round_up(source_.length(), cluster_) - at.value)
        return 0;
    std::vector<std::uint64_t> words;
    for (std::uint64_t done = 0; done < entries; done += words.size()) {
        require_going(stop_);
        words.resize(std::min(entries - done, batch));
        read_words(source_.file(), at + done * 8, words);
        for (const std::uint64_t word : words) {
            const std::uint64_t offset = word & entry::offset_mask;
            if (word & bitmap_reserved || (offset != 0 && word & 1) || offset % cluster_ != 0)
                corrupt(
                    fmt::format("an entry of the bitmap table at {:#x} is {:#x}, which is not valid", at.value, word));
            else if (offset != 0)
                count({offset}, cluster_, "a cluster of a bitmap");
        }
    }
    return entries * 8;
}

} // namespace qlean
