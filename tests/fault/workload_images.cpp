// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "tests/fault/workload_images.h"

#include "tests/fault/image_builder.h"
#include "tests/fault/recorded_guest.h"

#include <numeric>

namespace qlean::fault {

namespace {

/// The image of a guest that wrote everything in random order: nothing is where a compact image would have it.
ImagePlan scattered(unsigned cluster_bits, std::uint64_t virtual_size, std::uint64_t spread, std::uint64_t seed) {
    ImagePlan plan;
    plan.cluster_bits = cluster_bits;
    plan.virtual_size = virtual_size;
    std::mt19937_64 random(seed);
    std::vector<std::uint64_t> places(plan.guest_clusters() * spread);
    std::iota(places.begin(), places.end(), 4);
    std::shuffle(places.begin(), places.end(), random);
    for (std::uint64_t c = 0; c < plan.guest_clusters(); ++c)
        if (random() % 4 != 0)
            plan.data[c] = places[c];
        else if (random() % 4 == 0)
            plan.zero.push_back(c);
    return plan;
}

/// Half of the disk is compressed, its extents with gaps between them, some plain clusters among and behind them.
ImagePlan half_compressed(std::uint64_t seed) {
    std::mt19937_64 random(seed);
    ImagePlan plan;
    plan.cluster_bits = random() % 2 ? 9 : 12;
    plan.virtual_size = std::uint64_t{256} << plan.cluster_bits;
    plan.compressed_at = 20;
    const std::uint64_t cluster = std::uint64_t{1} << plan.cluster_bits, gap = random() % 3 * cluster / 4;
    std::uint64_t host = 300;
    for (std::uint64_t c = 0; c < plan.guest_clusters(); ++c)
        if (random() % 4 != 0)
            plan.compressed[c] = random() % 2 * gap;
        else if (random() % 2)
            plan.data[c] = host += 1 + random() % 2;
    return plan;
}

/// Of one in four the file goes on, for up to four refcount blocks' worth of 512-byte clusters.
Bytes with_tail(Bytes image, std::uint64_t seed) {
    const std::uint64_t chosen = std::mt19937_64(seed + 2)();
    if (chosen % 4 == 0)
        image.resize(image.size() + (1 + chosen / 4 % 1024) * 512, std::byte{0xaa});
    return image;
}

/// Two snapshots with a guest's work between them and after, in the image of `plan`.
Bytes with_snapshots_in(const ImagePlan &plan, std::uint64_t seed) {
    const auto used = [&](Bytes bytes, int steps) {
        const auto disk = std::make_shared<FaultyDisk>(std::move(bytes));
        auto image = open_image(disk);
        RecordedGuest guest(*image, *disk, seed);
        RecordedGuest::Mix mix;
        mix.most = 3000;
        for (int i = 0; i < steps; ++i)
            guest.step(mix);
        image->close();
        image.reset();
        return disk->bytes();
    };
    Bytes bytes = with_snapshot(used(build_image(plan).bytes, 10), "a");
    bytes = with_snapshot(used(std::move(bytes), 20), "b");
    if (seed % 2)
        bytes = with_snapshot(std::move(bytes), "c");
    return used(std::move(bytes), seed % 3 ? 15 : 0);
}

} // namespace

Bytes empty_small(std::uint64_t) { return empty_image(128 * 1024, 512); }
Bytes empty_host_blocks(std::uint64_t) { return empty_image(1024 * 1024, 4096, 2); }
Bytes empty_usual(std::uint64_t) { return empty_image(1024 * 1024, 65536); }
Bytes empty_to_grow(std::uint64_t) { return empty_image(3 * 1024 * 1024, 512); }
Bytes scattered_small(std::uint64_t seed) {
    return with_tail(build_image(scattered(9, 128 * 1024, 3, seed)).bytes, seed);
}
Bytes scattered_host_blocks(std::uint64_t seed) { return build_image(scattered(12, 512 * 1024, 2, seed)).bytes; }
Bytes scattered_subclusters(std::uint64_t seed) {
    ImagePlan plan = scattered(14, 512 * 1024, 2, seed);
    plan.extended = true;
    std::mt19937_64 random(seed + 1);
    for (std::uint64_t c = 0; c < plan.guest_clusters(); ++c)
        if (random() % 4 != 0) {
            const std::uint64_t zero = random() & random() & 0xffffffff;
            plan.subclusters[c] = zero << 32 | (plan.data.contains(c) ? random() & ~zero & 0xffffffff : 0);
        }
    return build_image(plan).bytes;
}
Bytes metadata_at_the_end(std::uint64_t seed) {
    ImagePlan plan;
    plan.virtual_size = 4 * 1024 * 1024;
    std::mt19937_64 random(seed);
    std::uint64_t host = 20;
    for (std::uint64_t c = 0; c < plan.guest_clusters(); ++c)
        if (random() % 16 == 0 || c < 100)
            plan.data[c] = host += 1 + random() % 2;
    plan.metadata_at = host + 1500;
    plan.table_clusters = 1 + random() % 3;
    if (random() % 2)
        plan.leaked = {host + 1400, host + 1401};
    return with_tail(build_image(plan).bytes, seed);
}
Bytes with_snapshots(std::uint64_t seed) { return with_snapshots_in(scattered(9, 64 * 1024, 4, seed), seed); }
Bytes compressed_image(std::uint64_t seed) { return build_image(half_compressed(seed)).bytes; }
Bytes compressed_with_snapshots(std::uint64_t seed) { return with_snapshots_in(half_compressed(seed), seed); }

Bytes with_bitmaps(std::uint64_t seed) {
    auto plan = scattered(9, 128 * 1024, 3, seed);
    plan.bitmaps = true;
    return build_image(plan).bytes;
}
Bytes to_be_resized(std::uint64_t seed) {
    auto plan = scattered(9, 100 * 1024 + 512, 2, seed);
    plan.bitmaps = seed % 2;
    // Left over from a larger disk: it must not show.
    plan.data[plan.guest_clusters() + 3] = plan.data.rbegin()->second + 1000;
    return build_image(plan).bytes;
}
} // namespace qlean::fault
