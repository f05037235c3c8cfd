// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// New places: for tables that share theirs with something else, and for the refcount structures.
#include "mender.h"

#include "../error.h"
#include "../refcount_block.h"

#include <set>

namespace qlean {

/// Where nothing is, and nothing points to.
HostCluster Mender::first_new() const {
    return {std::max({checker.clusters(), geometry_.clusters_for(file_.length()), checker.reach()})};
}

bool Mender::take_in() {
    if (!checker.needs_rebuild() || checker.reach() <= geometry_.clusters_for(file_.length()))
        return false;
    file_.truncate(geometry_.bytes(checker.reach()));
    return true;
}

// --- tables -------------------------------------------------------------------------------------------------------

bool Mender::separate() {
    const bool move_l1 = header_.l1_size > 0 && !may_write_l1();
    std::vector<Checker::Table> moves;
    for (const Checker::Table &table : checker.tables())
        if (table.active > 0 && !may_write(table) && table.at.value % geometry_.cluster_size() == 0 &&
            geometry_.cluster_of(table.at).value < checker.clusters())
            moves.push_back(table);
    if (moves.empty() && !move_l1)
        return false;
    HostCluster free = first_new();
    const std::uint64_t l1_clusters = geometry_.clusters_for(std::uint64_t{header_.l1_size} * 8);
    const HostRun places{free, moves.size() + (move_l1 ? l1_clusters : 0)};
    file_.truncate(geometry_.offset_of(places.end()).value);
    count_new_places(places);
    std::map<HostOffset, HostOffset> moved;
    std::vector<std::byte> bytes(geometry_.cluster_size());
    for (const Checker::Table &table : moves) {
        file_.read(bytes, table.at);
        file_.write(bytes, geometry_.offset_of(free));
        moved[table.at] = geometry_.offset_of(free);
        ++free;
    }
    auto l1 = source_.l1();
    for (std::uint64_t &word : l1)
        if (const auto found = moved.find(entry::table(word)); found != moved.end())
            word = (word & ~entry::offset_mask) | found->second.value;
    file_.sync();
    if (move_l1) {
        write_words(file_, l1, geometry_.offset_of(free));
        file_.sync();
        change_header(file_, [&](Header &h) { h.l1_offset = geometry_.offset_of(free); });
    } else {
        write_words(file_, l1, header_.l1_offset);
        file_.sync();
    }
    return true;
}

/// So that nobody takes them for free even if everything() never comes. Where there is no block for them, or none that
/// may be written, only the dirty bit says so.
void Mender::count_new_places(HostRun run) {
    const std::uint64_t per_block = geometry_.refcounts_per_block();
    for (HostCluster c = run.first; c < run.end();) {
        const std::uint64_t r = c.value / per_block;
        const HostCluster next{std::min((r + 1) * per_block, run.end().value)};
        const std::uint64_t at = r < checker.refcount_table().size() ? checker.refcount_table()[r] : 0;
        if (at != 0 && at % geometry_.cluster_size() == 0 &&
            checker.exact_references(geometry_.cluster_of(HostOffset{at}).value) == 1) {
            auto bytes = *checker.block(r);
            RefcountView view(bytes, header_.refcount_order);
            for (; c < next; ++c)
                view.set(c.value % per_block, 1);
            file_.write(bytes, HostOffset{at});
        }
        c = next;
    }
}

// --- new refcount structures --------------------------------------------------------------------------------------

/// They refer to clusters that nothing refers to once the header points elsewhere.
void Mender::forget_old_structures() {
    const auto &table = checker.refcount_table();
    const std::uint64_t first = geometry_.cluster_of(header_.refcount_table_offset).value;
    for (std::uint64_t i = 0; i < header_.refcount_table_clusters; ++i)
        ++old_[first + i];
    for (const std::uint64_t word : table)
        if (word != 0 && word % geometry_.cluster_size() == 0 &&
            geometry_.cluster_of(HostOffset{word}).value < checker.clusters())
            ++old_[geometry_.cluster_of(HostOffset{word}).value];
}

/// At the end of the file, where nothing is that anybody may miss. They count when the header points there.
void Mender::rebuild_refcounts() {
    const std::uint64_t per_block = geometry_.refcounts_per_block();
    const std::uint64_t start = first_new().value;
    std::set<std::uint64_t> used;
    for (std::uint64_t c = 0; c < start; ++c) {
        if (final_count({c}) == 0)
            continue;
        used.insert(c / per_block);
        c = (c / per_block + 1) * per_block - 1;
    }
    std::uint64_t table_clusters = 0, area = 0;
    for (;;) {
        for (std::uint64_t r = start / per_block; area > 0 && r <= (start + area - 1) / per_block; ++r)
            used.insert(r);
        table_clusters = used.empty() ? 1 : geometry_.clusters_for((*used.rbegin() + 1) * 8);
        if (area >= used.size() + table_clusters)
            break;
        area = used.size() + table_clusters;
    }
    if (geometry_.bytes(table_clusters) >
        std::max<std::uint64_t>(Header::max_refcount_table_bytes, geometry_.cluster_size()))
        throw Error(Error::Kind::no_space, ENOSPC,
                    fmt::format("'{}' cannot be repaired in place: its refcount table would exceed 8 MiB; convert it "
                                "to a new image with larger clusters",
                                file_.name()));
    file_.truncate(geometry_.bytes(start + area));
    std::vector<std::uint64_t> table(geometry_.bytes(table_clusters) / 8);
    std::vector<std::byte> bytes(geometry_.cluster_size());
    std::uint64_t home = start;
    for (const std::uint64_t r : used) {
        std::fill(bytes.begin(), bytes.end(), std::byte{0});
        RefcountView view(bytes, header_.refcount_order);
        for (std::uint64_t i = 0; i < per_block; ++i) {
            const std::uint64_t c = r * per_block + i;
            if (c < start)
                view.set(i, final_count({c}));
            else if (c < start + area)
                view.set(i, 1);
        }
        file_.write(bytes, geometry_.offset_of(HostCluster{home}));
        table[r] = geometry_.offset_of(HostCluster{home}).value;
        ++home;
    }
    const HostOffset table_home = geometry_.offset_of(HostCluster{start + area - table_clusters});
    write_words(file_, table, table_home);
    file_.sync();
    change_header(file_, [&](Header &h) {
        h.refcount_table_offset = table_home;
        h.refcount_table_clusters = static_cast<std::uint32_t>(table_clusters);
    });
}

} // namespace qlean
