// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Sound images of any layout, in memory: which guest cluster lies in which host cluster, and where the metadata is.
// Also the one way in which the tests open images.
#pragma once

#include "lib/image.h"
#include "tests/fault/faulty_file.h"

#include <map>
#include <string_view>

namespace qlean::fault {

struct ImagePlan {
    unsigned cluster_bits = 9;
    unsigned version = 3;
    std::uint64_t virtual_size = 256 * 1024;
    /// Guest cluster -> host cluster. The bytes there are filled(guest offset).
    std::map<std::uint64_t, std::uint64_t> data;
    /// Guest clusters with the zero flag: without a host cluster, or (if also in `data`) keeping it.
    std::vector<std::uint64_t> zero;
    /// Extended L2 entries. Guest clusters in `subclusters` have those, others in `data`
    /// all of them; the host cluster is filled whole either way.
    bool extended = false;
    std::map<std::uint64_t, std::uint64_t> subclusters;
    /// Guest clusters that are compressed (deflate), with the same bytes: their extents follow each other from host
    /// cluster `compressed_at` on, each as many bytes behind the one before as it says here.
    std::map<std::uint64_t, std::uint64_t> compressed;
    std::uint64_t compressed_at = 0;
    /// In a compressed cluster, half as many bytes to so many are noise instead: extents differ in length then.
    std::uint64_t noise = 0;
    /// L2 tables, L1 table, refcount table and refcount blocks, in that order, from this host cluster on; 0: after the
    /// data.
    std::uint64_t metadata_at = 0;
    /// Refcount table clusters, at least.
    std::uint64_t table_clusters = 1;
    /// Host clusters with a refcount and no referrer.
    std::vector<std::uint64_t> leaked;
    std::uint64_t autoclear = 0;
    std::uint32_t unknown_extension = 0;
    /// Two bitmaps of 512 bytes a bit, after the other metadata: one enabled and empty, one disabled with bits stored.
    bool bitmaps = false;

    /// The first `count` guest clusters, in order, from host cluster `first` on, `stride` apart; or all of them.
    ImagePlan &map(std::uint64_t count, std::uint64_t first, std::uint64_t stride = 1);
    ImagePlan &map_all(std::uint64_t first, std::uint64_t stride = 1) { return map(guest_clusters(), first, stride); }
    std::uint64_t guest_clusters() const { return divide_up(virtual_size, std::uint64_t{1} << cluster_bits); }
};

struct BuiltImage {
    Bytes bytes;
    std::map<std::uint64_t, std::uint64_t> l2_tables; ///< L1 index -> host offset
    std::uint64_t l1 = 0, refcount_table = 0;         ///< host offsets
    std::vector<std::uint64_t> refcount_blocks;
    std::uint64_t entry_size = 8; ///< bytes of an L2 entry
    /// Host offsets of the bitmaps' directory entries, the first of which is also the directory's.
    std::uint64_t enabled_bitmap = 0, disabled_bitmap = 0;

    std::uint64_t word(std::uint64_t at) const;
    void set_word(std::uint64_t at, std::uint64_t value);
    /// Where the 16-bit refcount of a host cluster is.
    std::uint64_t refcount_at(std::uint64_t cluster, unsigned cluster_bits = 9) const;
    std::uint64_t l2_entry_at(std::uint64_t guest_cluster, unsigned cluster_bits = 9) const;
};
BuiltImage build_image(const ImagePlan &plan);

/// Bytes of a bitmap's directory entry, with a name of up to 8.
constexpr std::uint64_t bitmap_entry_bytes = 32;
/// Host offset `at` has the entry of a bitmap of 512 bytes a bit, its table being so many words at `table`.
void store_bitmap_entry(std::span<std::byte> image, std::uint64_t at, std::uint64_t table, std::uint32_t words,
                        std::uint32_t flags, std::string_view name);

/// The image with an internal snapshot of its disk, as 'qemu-img snapshot -c' takes one. There must be room in clusters
/// that have refcount blocks.
Bytes with_snapshot(Bytes image, const std::string &name);

/// What build_image puts at guest offset `at`: never zero.
std::byte filled(std::uint64_t at);

/// An empty image, as create_image makes it.
Bytes empty_image(std::uint64_t virtual_size, std::uint64_t cluster_size, unsigned version = 3, bool extended = false);

std::unique_ptr<Image> open_image(const std::shared_ptr<FaultyDisk> &disk, bool read_only = false,
                                  std::uint64_t cache_bytes = 64 * 1024);
Bytes read_all(Image &image);
Bytes read_some(Image &image, std::uint64_t at, std::uint64_t length);
/// `length` bytes of `value`.
Bytes bytes_of(std::uint64_t length, unsigned value);

} // namespace qlean::fault
