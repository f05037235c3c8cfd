// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "snapshot_table.h"

#include "byte_order.h"
#include "error.h"

#include <cstring>

namespace qlean {

namespace {

constexpr std::uint64_t entry_alignment = 8;
constexpr std::uint64_t max_file_offset = std::uint64_t{1} << 56;

std::uint64_t encoded_length(const SnapshotEntry &e) {
    return SnapshotTable::fixed_bytes + e.extra.size() + e.id.size() + e.name.size();
}

} // namespace

std::uint64_t SnapshotEntry::vm_state_size() const {
    return extra.size() >= 8 ? load_be<std::uint64_t>(extra, 0) : vm_state_size_32;
}

std::uint64_t SnapshotEntry::disk_size(std::uint64_t of_image) const {
    return extra.size() >= 16 ? load_be<std::uint64_t>(extra, 8) : of_image;
}

SnapshotTable SnapshotTable::decode(std::span<const std::byte> bytes, std::uint32_t count, const Geometry &geometry,
                                    const std::string &file, std::uint64_t *length) {
    const auto damaged = [&](std::size_t i, const std::string &what) {
        throw_bad_image("'{}' is damaged: entry {} of its snapshot table {}; see 'qemu-img check'", file, i, what);
    };
    *length = 0;
    if (count > max_snapshots)
        throw_bad_image("'{}' is damaged: it claims {} snapshots, more than the {} that are possible", file, count,
                        max_snapshots);
    SnapshotTable table;
    std::uint64_t at = 0;
    for (std::uint32_t i = 0; i < count; ++i) {
        at = round_up(at, entry_alignment);
        if (at > bytes.size() || bytes.size() - at < fixed_bytes)
            damaged(i, "lies beyond the end of the table");
        SnapshotEntry e;
        e.l1_offset = {load_be<std::uint64_t>(bytes, at)};
        e.l1_size = load_be<std::uint32_t>(bytes, at + 8);
        const std::uint64_t id_length = load_be<std::uint16_t>(bytes, at + 12);
        const std::uint64_t name_length = load_be<std::uint16_t>(bytes, at + 14);
        e.date_sec = load_be<std::uint32_t>(bytes, at + 16);
        e.date_nsec = load_be<std::uint32_t>(bytes, at + 20);
        e.vm_clock_nsec = load_be<std::uint64_t>(bytes, at + 24);
        e.vm_state_size_32 = load_be<std::uint32_t>(bytes, at + 32);
        const std::uint64_t extra_length = load_be<std::uint32_t>(bytes, at + 36);
        if (extra_length > max_extra_bytes)
            damaged(i, fmt::format("has {} bytes of extra data, more than {}", extra_length, max_extra_bytes));
        at += fixed_bytes;
        if (bytes.size() - at < extra_length + id_length + name_length)
            damaged(i, "is longer than the table");
        const auto take = [&](std::uint64_t n) {
            const auto piece = bytes.subspan(at, n);
            at += n;
            return piece;
        };
        const auto text = [](std::span<const std::byte> piece) {
            return std::string(reinterpret_cast<const char *>(piece.data()), piece.size());
        };
        const auto extra = take(extra_length);
        e.extra.assign(extra.begin(), extra.end());
        e.id = text(take(id_length));
        e.name = text(take(name_length));
        const std::uint64_t l1_bytes = std::uint64_t{e.l1_size} * 8;
        if (l1_bytes > max_l1_bytes)
            damaged(i, fmt::format("has an L1 table of {} entries, which exceeds 32 MiB", e.l1_size));
        if (e.l1_size != 0 && (e.l1_offset.value == 0 || e.l1_offset.value % geometry.cluster_size() != 0 ||
                               e.l1_offset.value > max_file_offset - l1_bytes))
            damaged(i, fmt::format("has its L1 table at the impossible offset {:#x}", e.l1_offset.value));
        if (e.disk_size(0) > std::uint64_t{1} << 62)
            damaged(i, fmt::format("claims a disk of {} bytes", e.disk_size(0)));
        *length = at;
        table.entries.push_back(std::move(e));
    }
    return table;
}

std::vector<std::uint64_t> SnapshotTable::positions() const {
    std::vector<std::uint64_t> all;
    std::uint64_t at = 0;
    for (const SnapshotEntry &e : entries) {
        all.push_back(at);
        at = round_up(at + encoded_length(e), entry_alignment);
    }
    return all;
}

std::vector<std::byte> SnapshotTable::encode() const {
    std::vector<std::byte> bytes;
    for (const SnapshotEntry &e : entries) {
        std::uint64_t at = round_up(bytes.size(), entry_alignment);
        bytes.resize(at + encoded_length(e));
        store_be<std::uint64_t>(bytes, at, e.l1_offset.value);
        store_be<std::uint32_t>(bytes, at + 8, e.l1_size);
        store_be<std::uint16_t>(bytes, at + 12, static_cast<std::uint16_t>(e.id.size()));
        store_be<std::uint16_t>(bytes, at + 14, static_cast<std::uint16_t>(e.name.size()));
        store_be<std::uint32_t>(bytes, at + 16, e.date_sec);
        store_be<std::uint32_t>(bytes, at + 20, e.date_nsec);
        store_be<std::uint64_t>(bytes, at + 24, e.vm_clock_nsec);
        store_be<std::uint32_t>(bytes, at + 32, e.vm_state_size_32);
        store_be<std::uint32_t>(bytes, at + 36, static_cast<std::uint32_t>(e.extra.size()));
        at += fixed_bytes;
        const auto put = [&](const void *from, std::size_t n) {
            if (n != 0)
                std::memcpy(bytes.data() + at, from, n);
            at += n;
        };
        put(e.extra.data(), e.extra.size());
        put(e.id.data(), e.id.size());
        put(e.name.data(), e.name.size());
    }
    return bytes;
}

} // namespace qlean
