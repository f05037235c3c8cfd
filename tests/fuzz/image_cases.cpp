// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "tests/fuzz/image_cases.h"

#include "lib/bitmap_directory.h"
#include "lib/byte_order.h"
#include "lib/check/check.h"
#include "lib/create.h"
#include "lib/header.h"
#include "lib/snapshot_table.h"
#include "tests/fault/image_judge.h"
#include "tests/fuzz/input.h"
#include "tests/fuzz/memory_file.h"

#include <cstring>
#include <fmt/format.h>
#include <random>
#include <sys/mman.h>
#include <unistd.h>

namespace qlean::fuzz {

namespace {

using fault::ImagePlan;

/// A guest's clusters in random order, with gaps between them; some are zero.
ImagePlan scattered(unsigned cluster_bits, std::uint64_t clusters) {
    ImagePlan plan;
    plan.cluster_bits = cluster_bits;
    plan.virtual_size = (clusters << cluster_bits) - 512;
    std::mt19937 random(static_cast<std::uint32_t>(clusters));
    std::vector<std::uint64_t> places;
    for (std::uint64_t c = 0; c < clusters * 3 / 2; ++c)
        places.push_back(4 + c);
    std::shuffle(places.begin(), places.end(), random);
    for (std::uint64_t c = 0; c < clusters; ++c)
        if (random() % 4 != 0)
            plan.data[c] = places[c];
        else if (random() % 2 != 0)
            plan.zero.push_back(c);
    return plan;
}

ImagePlan compressed(unsigned cluster_bits) {
    ImagePlan plan;
    plan.cluster_bits = cluster_bits;
    plan.virtual_size = std::uint64_t{80} << cluster_bits;
    plan.compressed_at = 4;
    std::uint64_t host = 60;
    for (std::uint64_t c = 0; c < 80; ++c)
        if (c % 3 != 0)
            plan.compressed[c] = c % 5 * 40;
        else if (c % 2 != 0)
            plan.data[c] = host += 1 + c % 2;
    return plan;
}

ImagePlan subclusters() {
    ImagePlan plan = scattered(14, 12);
    plan.extended = true;
    for (std::uint64_t c = 0; c < 12; c += 2)
        plan.subclusters[c] = plan.data.contains(c) ? 0x00ff'0000'0f00'f0f0 : 0x00ff'0000'0000'0000;
    return plan;
}

/// Writes to an image through the engine, and gives what becomes of it.
template <class F>
Bytes used(Bytes bytes, F &&guest) {
    const auto disk = std::make_shared<MemoryDisk>(std::move(bytes));
    Image::Options options;
    options.cache_bytes = 65536;
    const auto image = Image::open(std::make_unique<MemoryFile>(disk), options);
    guest(*image);
    image->close();
    disk->bytes.resize(disk->length);
    return disk->bytes;
}

void write_some(Image &image, std::uint64_t step) {
    for (std::uint64_t at = step; at + 900 < image.size(); at += step)
        image.write(fault::bytes_of(900, static_cast<unsigned>(1 + at % 250)), {at});
}

Bytes with_snapshots(const ImagePlan &plan) {
    Bytes bytes =
        fault::with_snapshot(used(fault::build_image(plan).bytes, [](Image &i) { write_some(i, 7000); }), "a");
    bytes = fault::with_snapshot(used(std::move(bytes), [](Image &i) { write_some(i, 5000); }), "b");
    return used(std::move(bytes), [](Image &i) { write_some(i, 9000); });
}

Bytes of_width(unsigned refcount_order) {
    const auto disk = std::make_shared<MemoryDisk>(std::vector<std::byte>{});
    MemoryFile file(disk);
    CreateOptions options;
    options.virtual_size = 60 * 512;
    options.cluster_size = 512;
    options.refcount_order = refcount_order;
    create_image(file, options);
    disk->bytes.resize(disk->length);
    return used(disk->bytes, [](Image &i) { write_some(i, 2500); });
}

/// Turned into one with an external data file.
ImageCase with_data_file(const char *name, std::uint64_t autoclear) {
    ImageCase made{name, fault::empty_image(48 * 1024, 512), Bytes(48 * 1024), {}, 0, {}, false};
    store_be<std::uint64_t>(made.bytes, 72, Header::incompatible_data_file);
    store_be<std::uint64_t>(made.bytes, 88, autoclear);
    return made;
}

/// The image above a file that has a path and no place: as long as this process, and read-only.
Bytes above(const Bytes &content, std::string format, Bytes image) {
    const int fd = ::memfd_create("below", MFD_CLOEXEC);
    require(fd != -1 && ::write(fd, content.data(), content.size()) == static_cast<ssize_t>(content.size()),
            "no memory for a backing file");
    const std::string path = fmt::format("/proc/self/fd/{}", fd);
    const std::uint64_t length = format.size(), padded = round_up(length, 8), name = 104 + 8 + padded + 8;
    require(std::all_of(image.begin() + 104, image.begin() + static_cast<std::ptrdiff_t>(name + path.size()),
                        [](std::byte b) { return b == std::byte{0}; }),
            "no place for a name");
    const auto put = [&](const std::string &text, std::uint64_t at) {
        std::memcpy(image.data() + at, text.data(), text.size());
    };
    store_be<std::uint32_t>(image, 104, Header::extension_backing_format);
    store_be<std::uint32_t>(image, 108, static_cast<std::uint32_t>(length));
    put(format, 112);
    put(path, name);
    store_be<std::uint64_t>(image, 8, name);
    store_be<std::uint32_t>(image, 16, static_cast<std::uint32_t>(path.size()));
    return image;
}

} // namespace

std::vector<Region> regions_of(const Bytes &image) {
    std::vector<Region> regions{{0, 104}, {104, 408}};
    const Header header = Header::parse(image, "");
    const Geometry geometry = header.geometry();
    const auto word = [&](std::uint64_t at) { return load_be<std::uint64_t>(image, at); };
    const auto add = [&](std::uint64_t at, std::uint64_t length) {
        if (at != 0 && length != 0 && at + length <= image.size())
            regions.push_back({at, length});
    };
    const auto add_each = [&](std::uint64_t table, std::uint64_t words, std::uint64_t length) {
        add(table, words * 8);
        for (std::uint64_t i = 0; i < words; ++i)
            add(word(table + i * 8) & entry::offset_mask, length);
    };
    add_each(header.l1_offset.value, header.l1_size, geometry.cluster_size());
    add_each(header.refcount_table_offset.value, geometry.cluster_size() / 8, geometry.cluster_size());
    if (header.snapshot_count != 0) {
        std::uint64_t length = 0;
        const auto at = header.snapshots_offset.value;
        const auto table =
            SnapshotTable::decode(std::span(image).subspan(at), header.snapshot_count, geometry, "", &length);
        add(at, length);
        for (const SnapshotEntry &e : table.entries)
            add_each(e.l1_offset.value, e.l1_size, geometry.cluster_size());
    }
    if (const auto *extension = header.extension(Header::extension_bitmaps)) {
        const auto place = BitmapsExtension::parse(extension->data, geometry, "");
        const auto directory = std::span(image).subspan(place.directory.value, place.directory_bytes);
        add(place.directory.value, place.directory_bytes);
        for (const BitmapEntry &e : parse_bitmap_directory(directory, place.count, geometry, ""))
            add(e.table.value, e.table_bytes());
    }
    return regions;
}

const std::vector<ImageCase> &image_cases() {
    static const std::vector<ImageCase> cases = [] {
        std::vector<ImageCase> made;
        const auto add = [&](const char *name, Bytes bytes, bool judged = true) {
            made.push_back({name, std::move(bytes), {}, {}, 0, {}, judged});
        };
        const auto built = [](ImagePlan plan, auto &&change) {
            change(plan);
            return fault::build_image(plan).bytes;
        };
        const auto same = [](ImagePlan &) {};
        add("empty", fault::empty_image(30000, 512));
        add("scattered", built(scattered(9, 90), same));
        add("version 2", built(scattered(9, 70), [](ImagePlan &p) {
                p.version = 2;
                p.zero.clear();
            }));
        add("4 KiB clusters", built(scattered(12, 12), same));
        add("metadata at the end", built(scattered(9, 70), [](ImagePlan &p) {
                p.metadata_at = 300;
                p.table_clusters = 2;
                p.leaked = {200, 201, 280};
            }));
        add("unknown extension", built(scattered(9, 40), [](ImagePlan &p) { p.unknown_extension = 0x12345678; }));
        add("compressed", built(compressed(9), same));
        add("compressed, 4 KiB clusters", built(compressed(12), [](ImagePlan &p) {
                std::erase_if(p.compressed, [](const auto &c) { return c.first > 12; });
                std::erase_if(p.data, [](const auto &c) { return c.first > 12; });
                p.virtual_size = 13 * 4096;
            }));
        add("snapshots", with_snapshots(scattered(9, 70)));
        add("compressed with snapshots", with_snapshots(compressed(9)));
        add("bitmaps", built(scattered(9, 70), [](ImagePlan &p) { p.bitmaps = true; }), false);
        add("subclusters", built(subclusters(), same));
        add("1 bit", of_width(0), false);
        add("2 bits", of_width(1), false);
        add("8 bits", of_width(3), false);
        add("32 bits", of_width(5), false);
        add("64 bits", of_width(6), false);
        made.push_back(with_data_file("data file", 0));
        made.push_back(with_data_file("data file, raw", Header::autoclear_data_file_raw));
        // Both end before the disk above them does, one within a cluster.
        const Bytes below = fault::bytes_of(33 * 512 + 77, 0x5a);
        add("above raw", above(below, "raw", built(scattered(9, 70), same)), false);
        add("above raw, subclusters", above(below, "raw", built(subclusters(), same)), false);
        add("above qcow2", above(built(scattered(9, 40), same), "qcow2", built(compressed(9), same)), false);
        for (ImageCase &c : made) {
            MemoryFile file(std::make_shared<MemoryDisk>(c.bytes));
            c.leaks = check_file(file).leaks;
            c.regions = regions_of(c.bytes);
            if (c.judged)
                c.snapshots = fault::snapshot_disks(c.bytes);
        }
        return made;
    }();
    return cases;
}

} // namespace qlean::fuzz
