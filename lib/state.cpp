// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "state.h"

namespace qlean {

State::State(std::unique_ptr<File> file_, Header header_, std::vector<std::byte> header_sector,
             std::vector<std::uint64_t> l1_words, std::vector<std::uint64_t> refcount_table, std::uint64_t end,
             bool read_only_, std::uint64_t cache_bytes_)
    : file_owner(std::move(file_)), file(*file_owner), geometry(header_.geometry()), read_only(read_only_), syncs(file),
      header(file, header_, std::move(header_sector)), l1(std::move(l1_words), header_.l1_offset),
      l2(geometry, file, syncs, l1, cache_bytes_),
      refcounts(geometry, file, std::move(refcount_table), header_.refcount_table_offset),
      allocator(geometry, file, refcounts, end, [this] { return metadata_runs(); }),
      write_back(geometry, read_only, file, syncs, header, l1, l2, refcounts, allocator), ranges(geometry),
      mapper(geometry, header_.version, file, l1, l2, allocator), cache_bytes(cache_bytes_), opened_end(end) {}

std::vector<HostRun> State::metadata_runs() const {
    std::vector<HostRun> runs{{{0}, 1}};
    if (l1.size() > 0)
        runs.push_back({geometry.cluster_of(l1.home()), geometry.clusters_for(l1.size() * 8)});
    runs.push_back({geometry.cluster_of(refcounts.home()), refcounts.table_clusters()});
    for (const auto &[region, cluster] : refcounts.blocks())
        runs.push_back({cluster, 1});
    for (std::uint64_t i = 0; i < l1.size(); ++i)
        if (const HostOffset table = l1.table(i); table.value != 0)
            runs.push_back({geometry.cluster_of(table), 1});
    return runs;
}

} // namespace qlean
