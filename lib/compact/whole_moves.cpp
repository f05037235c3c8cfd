// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "whole_moves.h"

namespace qlean {

namespace {

HostCluster destination(const WholeMove &move) { return move.to.extents().front().run.first; }

void copy(State &state, const WholeMove &move) {
    std::vector<std::byte> bytes(state.geometry.cluster_size());
    for (std::uint64_t i = 0; i < move.from.count; ++i) {
        state.file.read(bytes, state.geometry.offset_of(move.from.first + i));
        state.file.write(bytes, state.geometry.offset_of(destination(move) + i));
    }
}

} // namespace

void carry_out(State &state, std::vector<WholeMove> &moves,
               const std::function<void(const std::vector<HostCluster> &to)> &switch_over) {
    if (moves.empty())
        return;
    state.write_back.write_refcounts_as_leader();
    for (const WholeMove &move : moves)
        copy(state, move);
    state.write_back.sync_as_leader();
    std::vector<HostRun> old;
    std::vector<HostCluster> to;
    for (WholeMove &move : moves) {
        to.push_back(destination(move));
        old.push_back(move.from);
        move.to.publish();
    }
    state.write_back.switch_as_leader([&] { switch_over(to); });
    state.allocator.retire(old);
}

} // namespace qlean
