// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "header.h"

#include "byte_order.h"
#include "error.h"

#include <algorithm>
#include <cstring>

namespace qlean {

namespace {

constexpr std::size_t v2_length = 72;
constexpr std::size_t v3_length = 104;
constexpr std::uint64_t max_file_offset = std::uint64_t{1} << 56;

void check_table(HostOffset at, std::uint64_t bytes, const Geometry &geometry, const char *what,
                 const std::string &file) {
    if (at.value % geometry.cluster_size() != 0)
        throw_bad_image("'{}' is damaged: its {} is at {:#x}, which is not a cluster boundary; see 'qemu-img check'",
                        file, what, at.value);
    if (at.value == 0 || at.value > max_file_offset - bytes)
        throw_bad_image("'{}' is damaged: its {} is at the impossible offset {:#x}", file, what, at.value);
}

void parse_extensions(Header &header, std::span<const std::byte> bytes, const std::string &file, std::uint64_t end) {
    std::uint64_t at = header.header_length;
    while (at + 8 <= end) {
        const auto type = load_be<std::uint32_t>(bytes, at);
        const auto length = load_be<std::uint32_t>(bytes, at + 4);
        if (type == Header::extension_end)
            return;
        at += 8;
        if (length > end - at)
            throw_bad_image("'{}' is damaged: header extension {:#010x} of {} bytes does not fit into the header", file,
                            type, length);
        const auto data = bytes.subspan(at, length);
        header.extensions.push_back({type, {data.begin(), data.end()}, at});
        at += round_up(length, 8);
    }
}

/// The name the image itself gives to incompatible feature `bit`.
std::string feature_name(const Header &header, unsigned bit) {
    if (const auto *table = header.extension(Header::extension_feature_names)) {
        const std::span<const std::byte> data = table->data;
        for (std::size_t at = 0; at + 48 <= data.size(); at += 48) {
            if (data[at] != std::byte{0} || data[at + 1] != std::byte(bit))
                continue;
            const auto *text = reinterpret_cast<const char *>(data.data() + at + 2);
            const std::string_view name(text, ::strnlen(text, 46));
            return fmt::format("'{}' (incompatible feature bit {})", name, bit);
        }
    }
    return fmt::format("unknown incompatible feature bit {}", bit);
}

} // namespace

const HeaderExtension *Header::extension(std::uint32_t type) const {
    for (const auto &e : extensions)
        if (e.type == type)
            return &e;
    return nullptr;
}

bool Header::has_unknown_extension() const {
    for (const auto &e : extensions)
        switch (e.type) {
        case extension_backing_format:
        case extension_feature_names:
        case extension_bitmaps:
        case extension_encryption:
        case extension_data_file:
            break;
        default:
            return true;
        }
    return false;
}

Header Header::parse(std::span<const std::byte> bytes, const std::string &file) {
    if (bytes.size() < v2_length || load_be<std::uint32_t>(bytes, 0) != magic)
        throw_bad_image("'{}' is not a QCOW2 image (no QCOW2 header at its start)", file);
    Header h;
    h.version = load_be<std::uint32_t>(bytes, 4);
    if (h.version != 2 && h.version != 3)
        throw Error(
            Error::Kind::unsupported, ENOTSUP,
            fmt::format("'{}' is a QCOW image of version {}; only versions 2 and 3 are supported", file, h.version));
    const auto backing_offset = load_be<std::uint64_t>(bytes, 8);
    const auto backing_size = load_be<std::uint32_t>(bytes, 16);
    h.cluster_bits = load_be<std::uint32_t>(bytes, 20);
    h.virtual_size = load_be<std::uint64_t>(bytes, 24);
    h.crypt_method = load_be<std::uint32_t>(bytes, 32);
    h.l1_size = load_be<std::uint32_t>(bytes, 36);
    h.l1_offset = {load_be<std::uint64_t>(bytes, 40)};
    h.refcount_table_offset = {load_be<std::uint64_t>(bytes, 48)};
    h.refcount_table_clusters = load_be<std::uint32_t>(bytes, 56);
    h.snapshot_count = load_be<std::uint32_t>(bytes, 60);
    h.snapshots_offset = {load_be<std::uint64_t>(bytes, 64)};
    h.header_length = v2_length;
    if (h.cluster_bits < 9 || h.cluster_bits > 21)
        throw_bad_image("'{}' is damaged: cluster size 2^{} is outside 512 bytes to 2 MiB", file, h.cluster_bits);
    if (h.version == 3) {
        if (bytes.size() < v3_length)
            throw_bad_image("'{}' is truncated: its header is incomplete", file);
        h.incompatible = load_be<std::uint64_t>(bytes, 72);
        h.compatible = load_be<std::uint64_t>(bytes, 80);
        h.autoclear = load_be<std::uint64_t>(bytes, 88);
        const auto order = load_be<std::uint32_t>(bytes, 96);
        h.header_length = load_be<std::uint32_t>(bytes, 100);
        if (order > 6)
            throw_bad_image("'{}' is damaged: refcount width 2^{} bits is larger than 64", file, order);
        h.refcount_order = order;
        if (h.header_length < v3_length || h.header_length % 8 != 0 ||
            h.header_length > (std::uint64_t{1} << h.cluster_bits))
            throw_bad_image("'{}' is damaged: header length {} is impossible", file, h.header_length);
        if (h.header_length > v3_length && bytes.size() > v3_length)
            h.compression_type = std::to_integer<std::uint8_t>(bytes[v3_length]);
    }
    const Geometry geometry = h.geometry();
    const std::uint64_t cluster = geometry.cluster_size();
    if (h.has_subclusters() && cluster < min_extended_cluster)
        throw_bad_image("'{}' is damaged: extended L2 entries need clusters of {} bytes or more, not {}", file,
                        min_extended_cluster, cluster);
    // QEMU refuses disks beyond this, and so avoids overflows in every later calculation.
    if (h.virtual_size > (std::uint64_t{1} << 62))
        throw_bad_image("'{}' is damaged: a disk of {} bytes is impossible", file, h.virtual_size);

    const std::uint64_t header_area = std::min<std::uint64_t>(bytes.size(), cluster);
    if (h.header_length > header_area)
        throw_bad_image("'{}' is truncated: its header is incomplete", file);
    std::uint64_t extension_area = header_area;
    if (backing_offset != 0) {
        if (backing_size > 1023 || backing_offset > cluster || backing_size > cluster - backing_offset ||
            backing_offset + backing_size > header_area)
            throw_bad_image("'{}' is damaged: its backing file name lies outside the first cluster", file);
        const auto *name = reinterpret_cast<const char *>(bytes.data() + backing_offset);
        h.backing_file.assign(name, ::strnlen(name, backing_size));
        if (backing_offset > h.header_length)
            extension_area = backing_offset;
    }
    parse_extensions(h, bytes, file, extension_area);

    if (std::uint64_t{h.l1_size} * 8 > max_l1_bytes)
        throw_bad_image("'{}' is damaged or too large: an L1 table of {} entries exceeds 32 MiB", file, h.l1_size);
    if (h.l1_size < geometry.l1_entries())
        throw_bad_image("'{}' is damaged: its L1 table has {} entries, but a disk of {} bytes needs {}", file,
                        h.l1_size, h.virtual_size, geometry.l1_entries());
    if (h.l1_size > 0)
        check_table(h.l1_offset, std::uint64_t{h.l1_size} * 8, geometry, "L1 table", file);
    if (h.refcount_table_clusters == 0)
        throw_bad_image("'{}' is damaged: it has no refcount table", file);
    if (std::uint64_t{h.refcount_table_clusters} > max_refcount_table_bytes / cluster &&
        !(h.refcount_table_clusters == 1))
        throw_bad_image("'{}' is damaged or too large: a refcount table of {} clusters exceeds 8 MiB", file,
                        h.refcount_table_clusters);
    check_table(h.refcount_table_offset, geometry.bytes(h.refcount_table_clusters), geometry, "refcount table", file);
    return h;
}

void Header::require_known(const std::string &file) const {
    const std::uint64_t known = incompatible_dirty | incompatible_corrupt | incompatible_data_file |
                                incompatible_compression | incompatible_extended_l2;
    for (unsigned bit = 0; bit < 64; ++bit)
        if ((incompatible & ~known) >> bit & 1)
            throw Error(Error::Kind::unsupported, ENOTSUP,
                        fmt::format("'{}' cannot be opened: it needs {}", file, feature_name(*this, bit)));
    if (compression_type > 1)
        throw Error(Error::Kind::unsupported, ENOTSUP,
                    fmt::format("'{}' cannot be opened: its compression type {} is unknown", file, compression_type));
    // As QEMU: the bit says that it is not deflate.
    if ((compression_type != 0) != ((incompatible & incompatible_compression) != 0))
        throw_bad_image("'{}' is damaged: its compression type is {}, and its feature bit for that is {}", file,
                        compression_type, compression_type != 0 ? "not set" : "set");
    if (crypt_method > crypt_luks)
        throw Error(Error::Kind::unsupported, ENOTSUP,
                    fmt::format("'{}' cannot be opened: its encryption method {} is unknown", file, crypt_method));
    if (crypt_method == crypt_luks && extension(extension_encryption) == nullptr)
        throw_bad_image("'{}' is damaged: it is encrypted with LUKS, but does not say where its encryption header is",
                        file);
    if (crypt_method != crypt_luks && extension(extension_encryption) != nullptr)
        throw_bad_image("'{}' is damaged: it has an encryption header, but is not encrypted with LUKS", file);
}

void Header::require_supported(const std::string &file) const {
    require_known(file);
    if (snapshot_count != 0 && (incompatible & incompatible_data_file))
        throw Error(Error::Kind::unsupported, ENOTSUP,
                    fmt::format("'{}' has internal snapshots and an external data file, which is not supported", file));
}

std::size_t Header::fixed_length() const { return version == 2 ? v2_length : v3_length; }

void Header::update(std::span<std::byte> sector) const {
    store_be<std::uint32_t>(sector, 0, magic);
    store_be<std::uint32_t>(sector, 4, version);
    store_be<std::uint32_t>(sector, 20, cluster_bits);
    store_be<std::uint64_t>(sector, 24, virtual_size);
    store_be<std::uint32_t>(sector, 32, crypt_method);
    store_be<std::uint32_t>(sector, 36, l1_size);
    store_be<std::uint64_t>(sector, 40, l1_offset.value);
    store_be<std::uint64_t>(sector, 48, refcount_table_offset.value);
    store_be<std::uint32_t>(sector, 56, refcount_table_clusters);
    store_be<std::uint32_t>(sector, 60, snapshot_count);
    store_be<std::uint64_t>(sector, 64, snapshots_offset.value);
    if (version == 2)
        return;
    store_be<std::uint64_t>(sector, 72, incompatible);
    store_be<std::uint64_t>(sector, 80, compatible);
    store_be<std::uint64_t>(sector, 88, autoclear);
    store_be<std::uint32_t>(sector, 96, refcount_order);
    store_be<std::uint32_t>(sector, 100, header_length);
}

std::vector<std::byte> Header::encode() const {
    std::vector<std::byte> bytes(version == 2 ? v2_length : header_length);
    update(bytes);
    for (const auto &e : extensions) {
        const std::size_t at = bytes.size();
        bytes.resize(at + 8 + round_up(e.data.size(), 8));
        store_be<std::uint32_t>(bytes, at, e.type);
        store_be<std::uint32_t>(bytes, at + 4, static_cast<std::uint32_t>(e.data.size()));
        std::copy(e.data.begin(), e.data.end(), bytes.begin() + static_cast<std::ptrdiff_t>(at + 8));
    }
    bytes.resize(bytes.size() + 8); // the end marker: type 0, length 0
    return bytes;
}

} // namespace qlean
