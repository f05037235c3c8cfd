// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "tests/fault/image_builder.h"

#include "lib/bitmap_directory.h"
#include "lib/byte_order.h"
#include "lib/create.h"
#include "lib/error.h"
#include "lib/l2_entry.h"
#include "lib/snapshot_table.h"

#include <random>
#include <set>
#include <zlib.h>

namespace qlean::fault {

namespace {

constexpr std::uint64_t copied = std::uint64_t{1} << 63;
constexpr std::uint64_t all_subclusters = 0xffffffff;

struct BitmapPlaces {
    std::uint64_t directory = 0, words = 0, enabled = 0, disabled = 0;
    std::vector<std::uint64_t> stored;
};

void write_bitmaps(BuiltImage &built, const BitmapPlaces &places, Header &header, std::uint64_t cluster) {
    const std::span<std::byte> out = built.bytes;
    const auto words = static_cast<std::uint32_t>(places.words);
    built.enabled_bitmap = places.directory;
    built.disabled_bitmap = places.directory + bitmap_entry_bytes;
    store_bitmap_entry(out, built.enabled_bitmap, places.enabled, words, BitmapEntry::flag_auto, "e");
    store_bitmap_entry(out, built.disabled_bitmap, places.disabled, words, 0, "d");
    for (std::uint64_t i = 0; i < places.words; ++i) {
        built.set_word(places.disabled + i * 8, places.stored[i]);
        for (std::uint64_t n = 0; n < cluster; ++n)
            out[places.stored[i] + n] = filled(i * cluster + n);
    }
    header.autoclear |= Header::autoclear_bitmaps;
    Bytes extension(24);
    store_be<std::uint32_t>(extension, 0, 2);
    store_be<std::uint64_t>(extension, 8, 2 * bitmap_entry_bytes);
    store_be<std::uint64_t>(extension, 16, places.directory);
    header.extensions.push_back({Header::extension_bitmaps, extension});
}

struct Extent {
    std::uint64_t guest, at;
    Bytes bytes;
};

std::vector<Extent> compress(const ImagePlan &plan) {
    std::vector<Extent> extents;
    const std::uint64_t cluster = std::uint64_t{1} << plan.cluster_bits;
    std::uint64_t at = plan.compressed_at * cluster;
    for (const auto &[guest, gap] : plan.compressed) {
        Bytes from(cluster), to(cluster * 2 + 64);
        for (std::uint64_t i = 0; i < cluster; ++i)
            from[i] = filled(guest * cluster + i);
        std::mt19937_64 random(guest);
        const std::uint64_t noise = plan.noise / 2 + random() % (plan.noise / 2 + 1);
        for (std::uint64_t i = 0; i < noise; ++i)
            from[i] = static_cast<std::byte>(random());
        z_stream stream{};
        deflateInit2(&stream, Z_DEFAULT_COMPRESSION, Z_DEFLATED, -12, 9, Z_DEFAULT_STRATEGY);
        stream.next_in = reinterpret_cast<Bytef *>(from.data());
        stream.avail_in = static_cast<uInt>(from.size());
        stream.next_out = reinterpret_cast<Bytef *>(to.data());
        stream.avail_out = static_cast<uInt>(to.size());
        deflate(&stream, Z_FINISH);
        to.resize(stream.total_out);
        deflateEnd(&stream);
        at += gap;
        extents.push_back({guest, at, to});
        at += to.size();
    }
    return extents;
}

} // namespace

std::byte filled(std::uint64_t at) { return std::byte(1 + (at * 2654435761u >> 9) % 255); }

ImagePlan &ImagePlan::map(std::uint64_t count, std::uint64_t first, std::uint64_t stride) {
    for (std::uint64_t c = 0; c < count; ++c)
        data[c] = first + c * stride;
    return *this;
}

std::uint64_t BuiltImage::word(std::uint64_t at) const { return load_be<std::uint64_t>(bytes, at); }
void BuiltImage::set_word(std::uint64_t at, std::uint64_t value) { store_be(std::span(bytes), at, value); }
std::uint64_t BuiltImage::refcount_at(std::uint64_t cluster, unsigned cluster_bits) const {
    const std::uint64_t per_block = (std::uint64_t{1} << cluster_bits) / 2;
    return refcount_blocks.at(cluster / per_block) + cluster % per_block * 2;
}
std::uint64_t BuiltImage::l2_entry_at(std::uint64_t guest_cluster, unsigned cluster_bits) const {
    const std::uint64_t per_table = (std::uint64_t{1} << cluster_bits) / entry_size;
    return l2_tables.at(guest_cluster / per_table) + guest_cluster % per_table * entry_size;
}

void store_bitmap_entry(std::span<std::byte> image, std::uint64_t at, std::uint64_t table, std::uint32_t words,
                        std::uint32_t flags, std::string_view name) {
    store_be<std::uint64_t>(image, at, table);
    store_be<std::uint32_t>(image, at + 8, words);
    store_be<std::uint32_t>(image, at + 12, flags);
    image[at + 16] = std::byte{1}; // tracks dirty bits
    image[at + 17] = std::byte{9}; // granularity
    store_be<std::uint16_t>(image, at + 18, static_cast<std::uint16_t>(name.size()));
    std::ranges::copy(std::as_bytes(std::span(name)), image.begin() + static_cast<std::ptrdiff_t>(at + 24));
}

BuiltImage build_image(const ImagePlan &plan) {
    BuiltImage built;
    built.entry_size = plan.extended ? 16 : 8;
    const std::uint64_t cluster = std::uint64_t{1} << plan.cluster_bits, per_table = cluster / built.entry_size;
    std::set<std::uint64_t> used{0}, tables;
    for (const auto &[guest, host] : plan.data) {
        used.insert(host);
        tables.insert(guest / per_table);
    }
    for (const std::uint64_t guest : plan.zero)
        tables.insert(guest / per_table);
    for (const auto &[guest, bitmap] : plan.subclusters)
        tables.insert(guest / per_table);
    for (const std::uint64_t host : plan.leaked)
        used.insert(host);
    const auto extents = compress(plan);
    std::map<std::uint64_t, std::uint16_t> shared; // host clusters with extents: how many
    for (const Extent &extent : extents) {
        tables.insert(extent.guest / per_table);
        for (std::uint64_t c = extent.at / cluster; c <= (extent.at + extent.bytes.size() - 1) / cluster; ++c) {
            used.insert(c);
            ++shared[c];
        }
    }

    std::uint64_t next = plan.metadata_at != 0 ? plan.metadata_at : *used.rbegin() + 1;
    const auto take = [&](std::uint64_t count) {
        for (;; ++next) { // the first place from `next` on with room
            std::uint64_t n = 0;
            while (n < count && !used.contains(next + n))
                ++n;
            if (n == count)
                break;
        }
        for (std::uint64_t n = 0; n < count; ++n)
            used.insert(next + n);
        next += count;
        return (next - count) * cluster;
    };
    for (const std::uint64_t i : tables)
        built.l2_tables[i] = take(1);
    const std::uint64_t l1_entries = std::max<std::uint64_t>(divide_up(plan.guest_clusters(), per_table), 1);
    built.l1 = take(divide_up(l1_entries * 8, cluster));
    built.refcount_table = take(plan.table_clusters);
    BitmapPlaces bitmaps;
    if (plan.bitmaps) {
        bitmaps.directory = take(1);
        bitmaps.words = divide_up(divide_up(plan.virtual_size, 512 * 8), cluster);
        bitmaps.enabled = take(divide_up(bitmaps.words * 8, cluster));
        bitmaps.disabled = take(divide_up(bitmaps.words * 8, cluster));
        for (std::uint64_t i = 0; i < bitmaps.words; ++i)
            bitmaps.stored.push_back(take(1));
    }
    do
        built.refcount_blocks.push_back(take(1));
    while (built.refcount_blocks.size() * (cluster / 2) <= *used.rbegin());

    built.bytes.resize((*used.rbegin() + 1) * cluster);
    const std::span<std::byte> out = built.bytes;
    Header header;
    header.version = plan.version;
    header.cluster_bits = plan.cluster_bits;
    header.virtual_size = plan.virtual_size;
    header.header_length = plan.version == 2 ? 72 : 104;
    header.l1_size = static_cast<std::uint32_t>(l1_entries);
    header.l1_offset = {built.l1};
    header.refcount_table_offset = {built.refcount_table};
    header.refcount_table_clusters = static_cast<std::uint32_t>(plan.table_clusters);
    header.autoclear = plan.autoclear;
    if (plan.extended)
        header.incompatible |= Header::incompatible_extended_l2;
    if (plan.unknown_extension != 0)
        header.extensions.push_back({plan.unknown_extension, Bytes(16, std::byte{0x5a})});
    if (plan.bitmaps)
        write_bitmaps(built, bitmaps, header, cluster);
    const auto head = header.encode();
    std::copy(head.begin(), head.end(), built.bytes.begin());
    for (const auto &[i, at] : built.l2_tables)
        store_be<std::uint64_t>(out, built.l1 + i * 8, at | copied);
    for (const auto &[guest, host] : plan.data) {
        const std::uint64_t entry = built.l2_entry_at(guest, plan.cluster_bits);
        built.set_word(entry, host * cluster | copied);
        if (plan.extended)
            built.set_word(entry + 8, all_subclusters);
        for (std::uint64_t i = 0; i < cluster; ++i)
            built.bytes[host * cluster + i] = filled(guest * cluster + i);
    }
    for (const std::uint64_t guest : plan.zero) {
        const std::uint64_t at = built.l2_entry_at(guest, plan.cluster_bits);
        if (plan.extended)
            built.set_word(at + 8, all_subclusters << 32);
        else
            built.set_word(at, built.word(at) | 1);
    }
    for (const auto &[guest, bitmap] : plan.subclusters)
        built.set_word(built.l2_entry_at(guest, plan.cluster_bits) + 8, bitmap);
    for (const Extent &extent : extents) {
        const std::uint64_t more = (extent.at + extent.bytes.size() - 1) / 512 - extent.at / 512;
        built.set_word(built.l2_entry_at(extent.guest, plan.cluster_bits),
                       std::uint64_t{1} << 62 | more << (62 - (plan.cluster_bits - 8)) | extent.at);
        std::copy(extent.bytes.begin(), extent.bytes.end(),
                  built.bytes.begin() + static_cast<std::ptrdiff_t>(extent.at));
    }
    for (std::size_t i = 0; i < built.refcount_blocks.size(); ++i)
        built.set_word(built.refcount_table + i * 8, built.refcount_blocks[i]);
    for (const std::uint64_t c : used)
        store_be<std::uint16_t>(out, built.refcount_at(c, plan.cluster_bits), shared.contains(c) ? shared[c] : 1);
    return built;
}

Bytes empty_image(std::uint64_t virtual_size, std::uint64_t cluster_size, unsigned version, bool extended) {
    const auto disk = std::make_shared<FaultyDisk>();
    FaultyFile file(disk);
    CreateOptions options;
    options.virtual_size = virtual_size;
    options.cluster_size = cluster_size;
    options.version = version;
    options.extended_l2 = extended;
    create_image(file, options);
    return disk->bytes();
}

std::unique_ptr<Image> open_image(const std::shared_ptr<FaultyDisk> &disk, bool read_only, std::uint64_t cache_bytes) {
    Image::Options options;
    options.read_only = read_only;
    options.cache_bytes = cache_bytes;
    return Image::open(std::make_unique<FaultyFile>(disk), options);
}

Bytes read_some(Image &image, std::uint64_t at, std::uint64_t length) {
    Bytes bytes(length);
    image.read(bytes, {at});
    return bytes;
}

Bytes read_all(Image &image) { return read_some(image, 0, image.size()); }

Bytes bytes_of(std::uint64_t length, unsigned value) { return Bytes(length, std::byte(value)); }

namespace {

/// An image with 16-bit refcounts, being changed by hand.
class Edited {
  public:
    explicit Edited(Bytes bytes) : bytes_(std::move(bytes)), cluster_(std::uint64_t{1} << get<std::uint32_t>(20)) {}

    template <class T>
    T get(std::uint64_t at) const {
        return load_be<T>(bytes_, at);
    }
    template <class T>
    void set(std::uint64_t at, T value) {
        store_be<T>(bytes_, at, value);
    }
    std::uint64_t cluster() const { return cluster_; }
    Bytes &bytes() { return bytes_; }

    /// Where the count of a cluster is; 0: nowhere.
    std::uint64_t count_at(std::uint64_t c) const {
        const std::uint64_t per_block = cluster_ / 2, table = get<std::uint64_t>(48);
        if (c / per_block >= get<std::uint32_t>(56) * cluster_ / 8)
            return 0;
        const std::uint64_t block = get<std::uint64_t>(table + c / per_block * 8);
        return block == 0 ? 0 : block + c % per_block * 2;
    }
    std::uint16_t add(std::uint64_t c) {
        const auto count = static_cast<std::uint16_t>(get<std::uint16_t>(count_at(c)) + 1);
        set<std::uint16_t>(count_at(c), count);
        return count;
    }
    /// `n` adjacent free clusters, the lowest.
    std::uint64_t allocate(std::uint64_t n) {
        for (std::uint64_t c = 1, run = 0;; ++c) {
            if (count_at(c) == 0)
                throw std::logic_error("no room for a snapshot");
            run = get<std::uint16_t>(count_at(c)) == 0 ? run + 1 : 0;
            if (run < n)
                continue;
            const std::uint64_t first = c + 1 - n;
            bytes_.resize(std::max<std::uint64_t>(bytes_.size(), (c + 1) * cluster_));
            for (std::uint64_t i = first; i <= c; ++i)
                add(i);
            std::fill_n(bytes_.begin() + static_cast<std::ptrdiff_t>(first * cluster_), n * cluster_, std::byte{0});
            return first * cluster_;
        }
    }

  private:
    Bytes bytes_;
    std::uint64_t cluster_;
};

} // namespace

Bytes with_snapshot(Bytes image, const std::string &name) {
    Edited e(std::move(image));
    const std::uint64_t cluster = e.cluster(), size = e.get<std::uint64_t>(24);
    const auto l1_size = e.get<std::uint32_t>(36);
    const std::uint64_t l1 = e.get<std::uint64_t>(40);
    const bool extended = e.get<std::uint32_t>(4) > 2 && (e.get<std::uint64_t>(72) & Header::incompatible_extended_l2);

    // The snapshot's L1 table: what the active one is now.
    const std::uint64_t copy = e.allocate(divide_up(std::uint64_t{l1_size} * 8, cluster));
    for (std::uint64_t i = 0; i < l1_size; ++i)
        e.set(copy + i * 8, e.get<std::uint64_t>(l1 + i * 8));
    // Everything it reaches is used once more, and so nothing is the active image's alone.
    for (std::uint64_t i = 0; i < l1_size; ++i) {
        const std::uint64_t word = e.get<std::uint64_t>(l1 + i * 8), table = word & entry::offset_mask;
        if (table == 0)
            continue;
        e.set(l1 + i * 8, word & ~entry::copied);
        e.add(table / cluster);
        for (std::uint64_t n = 0; n < cluster / 8; n += extended ? 2 : 1) {
            const std::uint64_t mapped = e.get<std::uint64_t>(table + n * 8), at = mapped & entry::offset_mask;
            if (mapped & entry::compressed) {
                const auto extent = entry::compressed_extent(mapped & ~entry::compressed, e.get<std::uint32_t>(20));
                for (std::uint64_t c = extent.at.value / cluster; c * cluster < (extent.at + extent.bytes).value; ++c)
                    e.add(c);
                continue;
            }
            if (at == 0)
                continue;
            e.set(table + n * 8, mapped & ~entry::copied);
            e.add(at / cluster);
        }
    }
    // The snapshot table with one more entry, in a new place.
    const auto count = e.get<std::uint32_t>(60);
    std::uint64_t length = 0;
    const std::uint64_t old = e.get<std::uint64_t>(64);
    SnapshotTable table;
    if (count != 0)
        table = SnapshotTable::decode(std::span(e.bytes()).subspan(old), count,
                                      Geometry(e.get<std::uint32_t>(20), 4, size), "x", &length);
    SnapshotEntry fresh;
    fresh.l1_offset = {copy};
    fresh.l1_size = l1_size;
    fresh.id = std::to_string(count + 1);
    fresh.name = name;
    fresh.extra.resize(16);
    store_be<std::uint64_t>(fresh.extra, 8, size);
    table.entries.push_back(fresh);
    const auto encoded = table.encode();
    const std::uint64_t home = e.allocate(divide_up(encoded.size(), cluster));
    std::copy(encoded.begin(), encoded.end(), e.bytes().begin() + static_cast<std::ptrdiff_t>(home));
    for (std::uint64_t c = old / cluster; count != 0 && c < divide_up(old + length, cluster); ++c)
        e.set<std::uint16_t>(e.count_at(c), 0);
    e.set<std::uint32_t>(60, count + 1);
    e.set<std::uint64_t>(64, home);
    return std::move(e.bytes());
}

} // namespace qlean::fault
