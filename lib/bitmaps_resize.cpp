// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Bitmaps of a disk that becomes larger. A table that has to become longer moves to a new place; until the disk has its
// new size such a bitmap is marked as inconsistent, for its table fits neither the old size nor the new one.
#include "bitmaps.h"

#include "byte_order.h"
#include "error.h"

namespace qlean {

void Bitmaps::require_resizable(const Geometry &wanted) const {
    for (std::size_t i = 0; i < size() && count(); ++i) {
        const BitmapEntry e = entry(i);
        const auto refuse = [&](const char *why) {
            throw Error(Error::Kind::denied, EPERM,
                        fmt::format("'{}' is not resized: its bitmap '{}' {}", file_.name(), e.name, why));
        };
        const bool ours = std::any_of(tracked_.begin(), tracked_.end(), [&](const Tracked &t) { return t.entry == i; });
        if (e.in_use() && !ours)
            refuse("is inconsistent; remove it with 'qemu-img bitmap --remove'");
        if (e.words_wanted(wanted) > BitmapEntry::max_bitmap_bytes / wanted.cluster_size())
            refuse("would become larger than 512 MiB; remove it, or replace it by one of coarser granularity");
    }
}

std::vector<std::size_t> Bitmaps::grow_tables(const std::function<Allocator::Reservation(std::uint64_t)> &reserve) {
    std::vector<std::size_t> grown;
    std::vector<Allocator::Reservation> homes;
    for (std::size_t i = 0; i < size() && count(); ++i) {
        const BitmapEntry e = entry(i);
        const std::uint64_t wanted = e.words_wanted(geometry_);
        if (e.in_use() || wanted <= e.table_size)
            continue;
        auto words = read_table(e);
        words.resize(geometry_.bytes(geometry_.clusters_for(wanted * 8)) / 8);
        for (std::uint64_t &word : words)
            word = big_endian(word);
        homes.push_back(reserve(geometry_.clusters_for(wanted * 8)));
        file_.write(std::as_bytes(std::span(words)), geometry_.offset_of(homes.back().extents().front().run.first));
        grown.push_back(i);
    }
    if (grown.empty())
        return grown;
    write_back_.write_refcounts_as_leader();
    set_in_use(grown, true);
    std::vector<HostRun> old;
    for (std::size_t n = 0; n < grown.size(); ++n)
        old.push_back(table_run(entry(grown[n])));
    // Where the table is before how long it is: a longer one at the old place would reach into what follows it.
    write_back_.switch_as_leader([&] {
        for (std::size_t n = 0; n < grown.size(); ++n) {
            const HostCluster home = homes[n].extents().front().run.first;
            homes[n].publish();
            switch_table(grown[n], geometry_.offset_of(home));
        }
    });
    write_back_.switch_as_leader([&] {
        for (const std::size_t i : grown) {
            const auto wanted = static_cast<std::uint32_t>(entry(i).words_wanted(geometry_));
            const std::uint32_t word = big_endian(wanted);
            file_.write(std::as_bytes(std::span(&word, 1)), entry_home(i) + BitmapEntry::table_size_at);
            const Lock guard(mutex_);
            entries_[i].table_size = wanted;
        }
    });
    allocator_.retire(old);
    return grown;
}

void Bitmaps::tables_grown(const std::vector<std::size_t> &grown) { set_in_use(grown, false); }

} // namespace qlean
