// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Moving what has no guest offset: L2 tables, the L1 table, refcount blocks and table. All of it is done as the commit
// leader, so no other writer of metadata is under way. A new home is written whole before anything points at it; for
// refcount structures and the L1 table the switch is durable before the leader goes on, so no refcount ever lives in
// two places.
#pragma once

#include "layout.h"

#include <functional>
#include <set>

namespace qlean {

/// Each is called from within a task of WriteBack::lead() and leaves entries for the next commit to publish.

/// Moves L2 table i below `end`. False: no room there, or nothing to move.
bool move_l2_table(State &state, std::uint64_t i, HostCluster end);
/// Gives back L2 table i if it maps nothing.
void drop_empty_table(State &state, std::uint64_t i);

/// These are durable when they return. They move what lies beyond layout.end as far as there is room.
/// Gives back blocks that the file has no use for, once it is as long as in `layout`.
void drop_refcount_blocks(State &state, const Layout &layout);
void move_refcount_blocks(State &state, const Layout &layout, std::uint64_t most);
void move_refcount_table(State &state, const Layout &layout);
void move_l1_table(State &state, const Layout &layout);

/// Clusters that the L1 and refcount tables want adjacent below layout.end; 0: nothing to move.
std::uint64_t adjacent_clusters_wanted(State &state, const Layout &layout);
/// Empties a window of `count` clusters below layout.end of guest data and keeps it empty (an embargo). Not called as
/// the leader; the moves want a commit that gives back before the window is free. False: there is no such window.
/// `repack` moves a compressed extent, given its descriptor; `give_back`: as for relocate_into().
bool empty_window(State &state, const Layout &layout, std::uint64_t count,
                  const std::function<void(GuestCluster, std::uint64_t)> &repack,
                  const std::function<void()> &give_back);

} // namespace qlean
