// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "state.h"

#include "error.h"

namespace qlean {

namespace {

Geometry disk_geometry(const Opened &opened) {
    Header header = opened.header;
    header.virtual_size = opened.virtual_size.value_or(header.virtual_size);
    return header.geometry();
}

} // namespace

State::State(Opened o)
    : file_owner(std::move(o.file)), data_owner(std::move(o.data)), backing(std::move(o.backing)), file(*file_owner),
      data(data_owner ? *data_owner : file), encryption_header(o.encryption_header),
      raw_data(o.header.has_data_file() && (o.header.autoclear & Header::autoclear_data_file_raw)),
      geometry(disk_geometry(o)), read_only(o.read_only), syncs(file, data),
      header(file, o.header, std::move(o.header_sector)), guard(geometry.cluster_bits()),
      claims(geometry, o.header.entry_format(), L2Cache::slice_count(geometry), o.end, guard),
      l1(std::move(o.l1_words), o.header.l1_offset), snapshots(geometry, file, syncs, l1, std::move(o.snapshots)),
      l2(geometry, file, syncs, l1, o.cache_bytes, read_only ? nullptr : &claims),
      refcounts(geometry, file, std::move(o.refcount_table), o.header.refcount_table_offset),
      allocator(geometry, file, refcounts, guard, o.end, [this](const VisitRun &visit) { each_used_run(visit); }),
      write_back(geometry, read_only, file, syncs, header, l1, l2, snapshots, refcounts, allocator), ranges(geometry),
      compressed(geometry, static_cast<Compression>(o.header.compression_type), file),
      mapper(geometry, o.header.entry_format(), file, l1, l2, snapshots, allocator, compressed, refcounts, guard,
             claims),
      contents(geometry, data, backing.get(), compressed),
      bitmaps(o.bitmaps ? std::make_unique<Bitmaps>(std::move(*o.bitmaps), geometry, file, header, refcounts, allocator,
                                                    write_back, claims,
                                                    [this](const VisitRun &visit) { each_metadata_run(visit); })
                        : nullptr),
      cache_bytes(o.cache_bytes), opened_end(o.end) {
    bool apart = guard.add({{0}, 1});
    apart = guard.add(encryption_header) && apart;
    apart = l1.guard_with(guard, geometry.cluster_size()) && apart;
    apart = refcounts.guard_with(guard) && apart;
    if (!apart && !read_only)
        throw_bad_image(
            "'{}' is damaged: two of its tables have a cluster in common, and writing one would destroy the "
            "other; open it read-only, or repair it with 'qlean check --repair all'",
            file.name());
    if (!read_only) {
        each_metadata_run([this](HostRun run) { require_counted(run); });
        snapshots.each_metadata_run([this](HostRun run) { claims.taken(run); });
    }
    if (bitmaps)
        write_back.keep_up(Header::autoclear_bitmaps);
    if (raw_data)
        write_back.keep_up(Header::autoclear_data_file_raw);
}

/// What is a table's own has a count, which is lowered when the table moves.
void State::require_counted(HostRun run) const {
    for (std::uint64_t c = run.first.value; c < run.end().value;) {
        const std::uint64_t region = c / refcounts.region_clusters();
        if (!refcounts.linked(region))
            throw_bad_image("'{}' is damaged: one of its tables is at {:#x}, for which there is no refcount block; "
                            "open it read-only, or repair it with 'qlean check --repair all'",
                            file.name(), geometry.bytes(c));
        c = (region + 1) * refcounts.region_clusters();
    }
}

void State::each_metadata_run(const VisitRun &visit) const {
    visit({{0}, 1});
    if (l1.size() > 0)
        visit(l1.run(geometry));
    visit(refcounts.table_run());
    if (encryption_header.count > 0)
        visit(encryption_header);
    for (const auto &[region, cluster] : refcounts.blocks())
        visit({cluster, 1});
    for (std::uint64_t i = 0; i < l1.size(); ++i)
        if (const HostOffset table = l1.table(i); table.value != 0)
            visit({geometry.cluster_of(table), 1});
    snapshots.each_metadata_run(visit);
}

void State::each_used_run(const VisitRun &visit) const {
    each_metadata_run(visit);
    if (bitmaps)
        bitmaps->each_run(visit);
}

} // namespace qlean
