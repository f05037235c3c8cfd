// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Moving what only snapshots have: clusters of theirs that the active image does not share, VM state, their L2 and L1
// tables, the snapshot table. It has no place in the plan of the disk, so it moves in FLUSH on `compact`.
//
// Everything moves once, with every reference: the new home has all the counts before anything points at it, the
// references change in the same phase of one commit, and the old home loses its counts after that. A table with words
// that are not in the file yet stays until they are: a word must not be written to where its table no longer is.
#pragma once

#include "../stop.h"
#include "layout.h"

namespace qlean {

/// What a walk finds that has to move. The first `most` of each kind are named, all are counted.
struct SnapshotWork {
    std::vector<std::pair<GuestCluster, HostCluster>> clusters;  ///< at or beyond `end`, as the tables
    std::vector<std::pair<GuestCluster, std::uint64_t>> extents; ///< with their descriptors
    std::vector<std::pair<std::uint64_t, HostOffset>> tables;    ///< L1 index and where; not those that are active too
    std::uint64_t pending = 0;                                   ///< of them all, as in Layout::pending
};
/// `to_repack`: which compressed extents have to.
SnapshotWork find_snapshot_work(State &state, HostCluster end, const std::function<bool(const Mapping &)> &to_repack,
                                std::size_t most, const StopCheck &stop);

/// Clusters of what needs no walk to be found: the L1 tables and the snapshot table.
std::uint64_t snapshot_clusters_beyond(const State &state, HostCluster end);

/// What snapshots map, to a cluster or an extent, that the active image does not map there as well; once.
void each_snapshot_mapping(State &state, const StopCheck &stop,
                           const std::function<void(GuestCluster, const Mapping &)> &each);

/// Moves these clusters below `end`; not as the leader. The number of those that moved. What was found for another end
/// may lie below this one, and stays. `give_back`: as for relocate_into().
std::uint64_t move_snapshot_clusters(State &state, const SnapshotWork &work, HostCluster end,
                                     const std::function<void()> &give_back, const StopCheck &stop);

// Called from within a task of WriteBack::lead():

/// They leave words for the next commit to publish. True if it moved.
bool move_snapshot_l2_table(State &state, std::uint64_t i, HostOffset table, HostCluster end);
/// These are durable when they return. The first stops when it has moved `most` clusters.
void move_snapshot_l1_tables(State &state, HostCluster end, std::uint64_t most);
void move_snapshot_table(State &state, HostCluster end);
/// Puts the snapshot table, without `gone`, to `room`; an empty one needs none. Nothing that is pending may be for
/// tables of `gone`.
void store_snapshot_table(State &state, Allocator::Reservation room, const Snapshot *gone);
/// Clusters that the largest of these wants adjacent.
std::uint64_t adjacent_clusters_of_snapshots(State &state, HostCluster end);

// For tables that the active image has too; with L1 lock(i) held exclusively, as the leader:
std::vector<SnapshotPointer> snapshots_with_table(State &state, std::uint64_t i, HostOffset table);
bool may_move_table(const State &state, HostOffset table);
void relink_snapshots(State &state, std::uint64_t i, const std::vector<SnapshotPointer> &snapshots, HostOffset table);

} // namespace qlean
