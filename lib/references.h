// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Everything in an image that refers to host clusters (docs/interop/qcow2, "Host cluster management": what a refcount
// counts). The one walk that compaction, the check and the status page rely on; each feature that owns clusters is
// visited here.
#pragma once

#include "state.h"
#include "stop.h"

namespace qlean {

/// What a walk meets. A cluster is met once for each reference it should be counted for.
class ReferenceVisitor {
  public:
    enum class Kind {
        header,
        l1_table,
        l2_table,        ///< the active image's own
        shared_l2_table, ///< of a snapshot; or the active image's, which must copy it before it changes
        refcount_table,
        refcount_block,
        snapshot_table,
        snapshot_l1_table,
        bitmap,
        encryption_header,
    };

    virtual ~ReferenceVisitor() = default;

    /// Host clusters that hold something other than the guest's data. Of the fixed structures it is called as the
    /// leader: it commits nothing.
    virtual void metadata(Kind kind, HostRun run) = 0;
    /// An L2 entry of the active image, unallocated ones included; also those beyond the end of the disk.
    virtual void entry(GuestCluster c, const Mapping &mapping) = 0;
    /// An L2 entry of a snapshot; of each snapshot by itself, even where they share the table.
    virtual void snapshot_entry(const Snapshot &snapshot, GuestCluster c, const Mapping &mapping) = 0;
    /// All entries of L2 table `i` of the active image have been met.
    virtual void table_done(std::uint64_t i, bool empty) = 0;
};

/// Walks beside the guest; what changes meanwhile is met as it was or as it is. No lock held. Throws Error (stopped)
/// when `stop` says so.
void walk_references(State &state, const StopCheck &stop, ReferenceVisitor &visitor);
/// The same of the active L2 tables alone.
void walk_active(State &state, const StopCheck &stop, ReferenceVisitor &visitor);

} // namespace qlean
