// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "create.h"

#include "byte_order.h"
#include "error.h"
#include "header.h"
#include "refcount_block.h"

#include <bit>

namespace qlean {

void create_image(File &file, const CreateOptions &options) {
    const auto refuse = [](const std::string &text) { throw Error(Error::Kind::unsupported, EINVAL, text); };
    if (!std::has_single_bit(options.cluster_size) || options.cluster_size < 512 || options.cluster_size > 2097152)
        refuse(fmt::format("a cluster size of {} is impossible; use a power of two from 512 to 2097152",
                           options.cluster_size));
    if (options.version != 2 && options.version != 3)
        refuse(fmt::format("version {} is impossible; use 2 or 3", options.version));
    if (options.refcount_order > 6 || (options.version == 2 && options.refcount_order != 4))
        refuse(fmt::format("refcounts of 2^{} bits are impossible; use 2^0 to 2^6, or 2^4 in version 2",
                           options.refcount_order));

    if (options.extended_l2 && (options.version < 3 || options.cluster_size < Header::min_extended_cluster))
        refuse("extended L2 entries need version 3 and clusters of 16384 bytes or more");

    Header header;
    header.version = options.version;
    header.refcount_order = options.refcount_order;
    if (options.extended_l2)
        header.incompatible |= Header::incompatible_extended_l2;
    header.cluster_bits = static_cast<unsigned>(std::countr_zero(options.cluster_size));
    header.virtual_size = options.virtual_size;
    if (options.version == 2)
        header.header_length = 72;
    const Geometry geometry = header.geometry();
    const std::uint64_t l1_entries = geometry.l1_entries();
    if (l1_entries * 8 > Header::max_l1_bytes)
        refuse(fmt::format("a disk of {} bytes is too large for clusters of {} bytes; use larger clusters",
                           options.virtual_size, options.cluster_size));

    // The refcount structures must describe themselves too: enlarge until they do.
    const std::uint64_t l1_clusters = std::max<std::uint64_t>(geometry.clusters_for(l1_entries * 8), 1);
    std::uint64_t blocks = 1, table_clusters = 1, total;
    for (;;) {
        total = 1 + table_clusters + blocks + l1_clusters;
        const std::uint64_t need_blocks = divide_up(total, geometry.refcounts_per_block());
        const std::uint64_t need_table = geometry.clusters_for(need_blocks * 8);
        if (need_blocks <= blocks && need_table <= table_clusters)
            break;
        blocks = std::max(blocks, need_blocks);
        table_clusters = std::max(table_clusters, need_table);
    }
    const HostCluster table{1}, first_block = table + table_clusters, l1 = first_block + blocks;
    header.refcount_table_offset = geometry.offset_of(table);
    header.refcount_table_clusters = static_cast<std::uint32_t>(table_clusters);
    header.l1_offset = geometry.offset_of(l1);
    header.l1_size = static_cast<std::uint32_t>(std::max<std::uint64_t>(l1_entries, 1)); // its cluster is not a leak

    file.truncate(geometry.bytes(total));
    std::vector<std::byte> entries(blocks * 8);
    for (std::uint64_t b = 0; b < blocks; ++b)
        store_be<std::uint64_t>(entries, b * 8, geometry.offset_of(first_block + b).value);
    file.write(entries, header.refcount_table_offset);
    std::vector<std::byte> counts(geometry.bytes(blocks));
    RefcountView view(counts, geometry.refcount_order());
    for (std::uint64_t c = 0; c < total; ++c)
        view.set(c, 1);
    file.write(counts, geometry.offset_of(first_block));
    file.sync();
    file.write(header.encode(), HostOffset{0});
    file.sync();
}

} // namespace qlean
