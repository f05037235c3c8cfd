// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Structures that the leader makes longer or gives another place: refcount blocks and table ahead of the end of the
// file, the L1 table.
#include "write_back.h"

#include "byte_order.h"
#include "error.h"

namespace qlean {

namespace {

constexpr std::uint64_t min_margin_bytes = 4 * 1024 * 1024;

} // namespace

std::uint64_t WriteBack::margin(std::uint64_t table_clusters) const {
    return std::max(min_margin_bytes / geometry_.cluster_size(), 2 * table_clusters) + 1;
}

std::uint64_t WriteBack::last_region_wanted(std::uint64_t end, std::uint64_t table_clusters) const {
    return (end + margin(table_clusters)) / refcounts_.region_clusters();
}

std::uint64_t WriteBack::last_region_needed(std::uint64_t end) const {
    return (end + margin(refcounts_.table_clusters()) / 2 - 1) / refcounts_.region_clusters();
}

void WriteBack::link_ahead(std::uint64_t more) {
    if (autoclear_to_clear() != 0)
        return; // nothing has changed yet, so nothing grows; and nothing may be written before these bits are cleared
    const std::uint64_t region_clusters = refcounts_.region_clusters();
    // Compaction may cut a tail that no block describes. One for what comes behind it would lie there, and with small
    // clusters the table that reaches so far is long, and may find no place to move to: not before room is short.
    if (more == 0 && !allocator_.short_of_room() && allocator_.ends_without_block())
        return;
    const std::uint64_t end = allocator_.end() + more, covered = allocator_.covered_end();
    if (covered > last_region_needed(end) * region_clusters)
        return;
    const std::uint64_t first = covered / region_clusters;
    const std::uint64_t last = last_region_wanted(end, refcounts_.table_clusters());
    std::vector<std::uint64_t> missing;
    for (std::uint64_t r = first; r <= last; ++r)
        if (!refcounts_.linked(r))
            missing.push_back(r);
    if (missing.empty())
        return;
    try {
        link_regions(missing);
    } catch (const Error &error) {
        // On a full disk the commit must go on: it is what gives space back. Growing will say that there is none.
        // Not so if it was a sync that found the disk full: the image is poisoned then.
        if (error.kind() != Error::Kind::no_space || poisoned())
            throw;
    }
}

void WriteBack::link_regions(const std::vector<std::uint64_t> &regions) {
    auto blocks = regions.back() < refcounts_.table_entries()
                      ? allocator_.reserve(regions.size(), Allocator::Growth::now)
                      : Allocator::Reservation{};
    if (blocks.empty()) {
        link_beyond(regions.front(), regions.back() - regions.front() + 1);
        return;
    }
    write_refcounts_as_leader();
    std::vector<HostCluster> homes;
    for (const auto &extent : blocks.extents())
        for (std::uint64_t i = 0; i < extent.run.count; ++i)
            homes.push_back(extent.run.first + i);
    for (std::size_t i = 0; i < regions.size(); ++i)
        file_.write(new_block(allocator_.uncounted_in_use(regions[i])), geometry_.offset_of(homes[i]));
    sync();
    // The blocks and their own refcounts are durable: now they may be reached.
    blocks.publish();
    switch_as_leader([&] {
        for (std::size_t i = 0; i < regions.size(); ++i) {
            const std::uint64_t word = big_endian(geometry_.offset_of(homes[i]).value);
            file_.write(std::as_bytes(std::span(&word, 1)), refcounts_.home() + regions[i] * 8);
        }
    });
    for (std::size_t i = 0; i < regions.size(); ++i)
        refcounts_.set_block(regions[i], geometry_.offset_of(homes[i]));
}

/// A refcount block in which the first clusters have a count of one.
std::vector<std::byte> WriteBack::new_block(std::uint64_t counted) const {
    std::vector<std::byte> block(geometry_.cluster_size());
    RefcountView view(block, geometry_.refcount_order());
    for (std::uint64_t i = 0; i < std::min(counted, refcounts_.region_clusters()); ++i)
        view.set(i, 1);
    return block;
}

/// Nothing covered is free, or the table is full: the new blocks (and a larger table) go to the first region that
/// has no block, behind what is in the file, and describe themselves.
void WriteBack::link_beyond(std::uint64_t first_region, std::uint64_t count) {
    const std::uint64_t region_clusters = refcounts_.region_clusters();
    const std::uint64_t uncounted = allocator_.uncounted_in_use(first_region);
    const std::uint64_t start = first_region * region_clusters + uncounted;
    std::uint64_t table_entries = refcounts_.table_entries(), new_table_clusters = 0;
    for (;;) { // a larger area may need another block, which makes the area larger
        if (first_region + count > table_entries) {
            table_entries = std::max(first_region + count, refcounts_.table_entries() * 2);
            new_table_clusters = geometry_.clusters_for(table_entries * 8);
            table_entries = geometry_.bytes(new_table_clusters) / 8;
        }
        if (count * region_clusters >= uncounted + count + new_table_clusters + region_clusters / 2)
            break;
        ++count;
    }
    if (geometry_.bytes(new_table_clusters) >
        std::max<std::uint64_t>(Header::max_refcount_table_bytes, geometry_.cluster_size()))
        throw Error(
            Error::Kind::no_space, ENOSPC,
            fmt::format("'{}' cannot grow: its refcount table would exceed 8 MiB; use larger clusters", file_.name()));
    const std::uint64_t area = count + new_table_clusters;
    allocator_.claim_beyond({start}, area);

    std::vector<std::uint64_t> entries(count);
    for (std::uint64_t b = 0; b < count; ++b)
        entries[b] = big_endian(geometry_.offset_of(HostCluster{start + b}).value);
    const HostOffset new_home = geometry_.offset_of(HostCluster{start + count});
    try {
        for (std::uint64_t b = 0; b < count; ++b) {
            const std::uint64_t counted = uncounted + area - std::min(uncounted + area, b * region_clusters);
            file_.write(new_block(counted), geometry_.offset_of(HostCluster{start + b}));
        }
        if (new_table_clusters != 0) {
            auto words = refcounts_.table_words(0, table_entries);
            std::copy(entries.begin(), entries.end(), words.begin() + static_cast<std::ptrdiff_t>(first_region));
            file_.write(std::as_bytes(std::span(words)), new_home);
        }
    } catch (...) {
        // Each commit of a full disk would make the file longer, and leave regions that no block describes.
        allocator_.unclaim_beyond({{start}, area});
        throw;
    }
    sync();
    const HostRun old_table = refcounts_.table_run();
    switch_as_leader([&] {
        if (new_table_clusters == 0)
            return file_.write(std::as_bytes(std::span(entries)), refcounts_.home() + first_region * 8);
        header_.update([&](Header &h) {
            h.refcount_table_offset = new_home;
            h.refcount_table_clusters = static_cast<std::uint32_t>(new_table_clusters);
        });
    });
    if (new_table_clusters != 0)
        refcounts_.set_table(new_home, table_entries);
    for (std::uint64_t b = 0; b < count; ++b)
        refcounts_.set_block(first_region + b, geometry_.offset_of(HostCluster{start + b}));
    if (new_table_clusters != 0)
        allocator_.retire({old_table});
}

void WriteBack::move_l1_as_leader(Allocator::Reservation room, std::uint64_t entries) {
    const HostOffset home = geometry_.offset_of(room.extents().front().run.first);
    write_refcounts_as_leader();
    // What is durable now, not what is in memory: that may point at tables that are not written yet.
    std::vector<std::byte> bytes(geometry_.bytes(geometry_.clusters_for(entries * 8)));
    file_.read(std::span(bytes).first(l1_.size() * 8), l1_.home());
    file_.write(bytes, home);
    sync();
    room.publish();
    const HostRun old = l1_.run(geometry_);
    switch_as_leader([&] {
        header_.update([&](Header &h) {
            h.l1_offset = home;
            h.l1_size = static_cast<std::uint32_t>(entries);
        });
    });
    l1_.set_home(home);
    if (old.count > 0)
        allocator_.retire({old});
}

} // namespace qlean
