// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// What refers to one cluster, or to one compressed extent: the active image and snapshots, all at the same guest
// cluster. Whatever moves is found by all of them at its new place, or by none.
#pragma once

#include "../state.h"

#include <functional>
#include <optional>

namespace qlean {

struct Referrers {
    bool active = false;
    std::vector<SnapshotPointer> snapshots;

    std::uint64_t count() const { return snapshots.size() + active; }
};

/// Brings what find_referrers() will read into memory, with no lock held meanwhile.
void warm_referrers(State &state, GuestCluster c);

/// Whose entries of guest cluster `c` satisfy `refers`; as long as `c` is in the range lock it stays that way. Nothing
/// if the active image has the cluster where its entries do not change, or in its own metadata. Throws Error.
std::optional<Referrers> find_referrers(State &state, GuestCluster c,
                                        const std::function<bool(const Mapping &)> &refers);

/// With `c` in the range lock, exclusively: makes of the first word of each of their entries what `changed` does.
/// Throws Error with nothing changed. `before` is called when that can no longer happen: whatever the new words refer
/// to must have its references when it returns.
void change_all(State &state, GuestCluster c, const Referrers &referrers,
                const std::function<std::uint64_t(std::uint64_t)> &changed, const std::function<void()> &before);

} // namespace qlean
