// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "references.h"

#include <shared_mutex>

namespace qlean {

namespace {

using Kind = ReferenceVisitor::Kind;

constexpr std::uint64_t batch = 8192;

/// Header, L1 table, refcount structures, bitmaps. Taken between commits, for only their leader moves these.
void walk_fixed(State &state, ReferenceVisitor &visitor) {
    const Geometry &g = state.geometry;
    state.write_back.lead([&] {
        visitor.metadata(Kind::header, {{0}, 1});
        if (state.l1.size() > 0)
            visitor.metadata(Kind::l1_table, state.l1.run(g));
        visitor.metadata(Kind::refcount_table, state.refcounts.table_run());
        if (state.encryption_header.count > 0)
            visitor.metadata(Kind::encryption_header, state.encryption_header);
        for (const auto &[region, cluster] : state.refcounts.blocks())
            visitor.metadata(Kind::refcount_block, {cluster, 1});
        if (state.bitmaps) {
            if (const auto damage = state.bitmaps->damage())
                throw_bad_image("'{}' is damaged: {}; repair it with 'qemu-img check -r all'", state.file.name(),
                                *damage);
            state.bitmaps->each_run([&](HostRun run) { visitor.metadata(Kind::bitmap, run); });
        }
    });
}

/// What a walk sees of the entry may be older than the end of the file: one that seems damaged is read once more while
/// nobody changes it.
template <class Read>
void look_again(State &state, GuestCluster c, Mapping &m, Read &&read) {
    if (m.kind != Mapping::Kind::damaged || c.value >= state.geometry.guest_clusters())
        return;
    const RangeLock::Shared guard(state.ranges, state.geometry.offset_of(c), 1);
    read(std::span(&m, 1));
}

/// What snapshots refer to. The caller keeps them from going meanwhile.
void walk_snapshots(State &state, const StopCheck &stop, ReferenceVisitor &visitor) {
    const Geometry &g = state.geometry;
    const auto snapshots = state.snapshots.list();
    std::vector<std::pair<Kind, HostRun>> fixed;
    state.write_back.lead([&] {
        fixed.push_back({Kind::snapshot_table, state.snapshots.table_run()});
        for (const auto &snapshot : snapshots)
            if (snapshot->l1_size() > 0)
                fixed.push_back({Kind::snapshot_l1_table, snapshot->l1_run(g)});
    });
    for (const auto &[kind, run] : fixed)
        visitor.metadata(kind, run);
    std::vector<Mapping> mappings;
    for (const auto &snapshot : snapshots)
        for (std::uint64_t i = 0; i < snapshot->l1_size(); ++i) {
            const HostOffset table = snapshot->table(i);
            if (table.value == 0)
                continue;
            require_going(stop);
            visitor.metadata(Kind::shared_l2_table, {g.cluster_of(table), 1});
            const std::uint64_t first = i * g.l2_entries(), end = first + g.l2_entries();
            for (std::uint64_t at = first; at < end; at += batch) {
                mappings.resize(std::min(batch, end - at));
                state.mapper.survey(*snapshot, {at}, mappings);
                for (std::size_t n = 0; n < mappings.size(); ++n) {
                    look_again(state, {at + n}, mappings[n],
                               [&](std::span<Mapping> m) { state.mapper.survey(*snapshot, {at + n}, m); });
                    visitor.snapshot_entry(*snapshot, {at + n}, mappings[n]);
                }
            }
        }
}

} // namespace

void walk_active(State &state, const StopCheck &stop, ReferenceVisitor &visitor) {
    const Geometry &g = state.geometry;
    std::vector<Mapping> mappings;
    for (std::uint64_t i = 0; i < state.l1.size(); ++i) {
        const HostOffset table = state.l1.table(i);
        if (table.value == 0)
            continue;
        require_going(stop);
        const bool shared = state.snapshots.any() && (state.l1.word(i) & entry::copied) == 0;
        visitor.metadata(shared ? Kind::shared_l2_table : Kind::l2_table, {g.cluster_of(table), 1});
        // All of it: entries beyond the end of the disk (VM state, a disk that was shrunk) hold clusters too.
        const std::uint64_t first = i * g.l2_entries(), end = first + g.l2_entries();
        bool empty = true;
        for (std::uint64_t at = first; at < end; at += batch) {
            mappings.resize(std::min(batch, end - at));
            state.mapper.survey({at}, mappings);
            for (std::size_t n = 0; n < mappings.size(); ++n) {
                look_again(state, {at + n}, mappings[n],
                           [&](std::span<Mapping> m) { state.mapper.survey({at + n}, m); });
                empty = empty && state.contents.is_nothing({at + n}, mappings[n]);
                visitor.entry({at + n}, mappings[n]);
            }
        }
        visitor.table_done(i, empty);
    }
}

void walk_references(State &state, const StopCheck &stop, ReferenceVisitor &visitor) {
    const std::shared_lock guard(state.snapshots.lock());
    walk_fixed(state, visitor);
    walk_active(state, stop, visitor);
    if (state.snapshots.any())
        walk_snapshots(state, stop, visitor);
}

} // namespace qlean
