// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "bitmap_moves.h"

namespace qlean {

namespace {

/// One thing that moves: its clusters, adjacent in both places, and who is told.
struct Move {
    HostRun from;
    Allocator::Reservation to;
    std::size_t bitmap;
    std::uint64_t word; ///< of its table, for stored bits
};

HostCluster destination(const Move &move) { return move.to.extents().front().run.first; }

void copy(State &state, const HostRun &from, HostCluster to) {
    std::vector<std::byte> bytes(state.geometry.cluster_size());
    for (std::uint64_t i = 0; i < from.count; ++i) {
        state.file.read(bytes, state.geometry.offset_of(from.first + i));
        state.file.write(bytes, state.geometry.offset_of(to + i));
    }
}

template <class SwitchOver>
void carry_out(State &state, std::vector<Move> &moves, SwitchOver &&switch_over) {
    if (moves.empty())
        return;
    state.write_back.write_refcounts_as_leader();
    for (const Move &move : moves)
        copy(state, move.from, destination(move));
    state.write_back.sync_as_leader();
    std::vector<HostRun> old;
    std::vector<HostCluster> to;
    for (Move &move : moves) {
        to.push_back(destination(move));
        old.push_back(move.from);
        move.to.publish();
    }
    state.write_back.switch_as_leader([&] { switch_over(to); });
    state.allocator.retire(old);
}

bool beyond(const HostRun &run, HostCluster end) { return run.end() > end; }

void move_stored(State &state, HostCluster end, std::uint64_t most) {
    Bitmaps &bitmaps = *state.bitmaps;
    std::vector<Move> moves;
    for (std::size_t i = 0; i < bitmaps.size(); ++i) {
        const auto table = bitmaps.read_table(bitmaps.entry(i));
        for (std::uint64_t w = 0; w < table.size() && moves.size() < most; ++w) {
            const BitmapWord word = BitmapWord::decode(table[w], state.geometry);
            if (word.kind != BitmapWord::Kind::stored || word.host < end)
                continue;
            auto room = state.allocator.reserve_below(1, end);
            if (room.empty())
                break;
            moves.push_back({{word.host, 1}, std::move(room), i, w});
        }
    }
    carry_out(state, moves, [&](const std::vector<HostCluster> &to) {
        std::vector<std::pair<std::uint64_t, HostCluster>> words;
        for (std::size_t n = 0; n < moves.size(); ++n) {
            words.emplace_back(moves[n].word, to[n]);
            if (n + 1 == moves.size() || moves[n + 1].bitmap != moves[n].bitmap)
                bitmaps.switch_stored(moves[n].bitmap, std::exchange(words, {}));
        }
    });
}

void move_tables(State &state, HostCluster end) {
    Bitmaps &bitmaps = *state.bitmaps;
    std::vector<Move> moves;
    for (std::size_t i = 0; i < bitmaps.size(); ++i) {
        const HostRun run = bitmaps.table_run(bitmaps.entry(i));
        if (!beyond(run, end))
            continue;
        auto room = state.allocator.reserve_contiguous_below(run.count, end);
        if (!room.empty())
            moves.push_back({run, std::move(room), i, 0});
    }
    carry_out(state, moves, [&](const std::vector<HostCluster> &to) {
        for (std::size_t n = 0; n < moves.size(); ++n)
            bitmaps.switch_table(moves[n].bitmap, state.geometry.offset_of(to[n]));
    });
}

void move_directory(State &state, HostCluster end) {
    const HostRun run = state.bitmaps->directory_run();
    if (!beyond(run, end))
        return;
    auto room = state.allocator.reserve_contiguous_below(run.count, end);
    if (room.empty())
        return;
    std::vector<Move> moves;
    moves.push_back({run, std::move(room), 0, 0});
    carry_out(state, moves, [&](const std::vector<HostCluster> &to) {
        state.bitmaps->switch_directory(state.geometry.offset_of(to.front()));
    });
}

} // namespace

std::uint64_t bitmap_clusters_beyond(State &state, HostCluster end) {
    std::uint64_t n = 0;
    if (!state.bitmaps)
        return n;
    state.write_back.lead([&] {
        for (const HostRun &run : state.bitmaps->runs())
            n += run.end().value - std::min(run.end(), std::max(run.first, end)).value;
    });
    return n;
}

std::uint64_t adjacent_bitmap_clusters_wanted(const State &state, HostCluster end) {
    std::uint64_t most = 0;
    if (!state.bitmaps || !state.bitmaps->count())
        return most;
    const auto consider = [&](const HostRun &run) {
        if (beyond(run, end))
            most = std::max(most, run.count);
    };
    consider(state.bitmaps->directory_run());
    for (std::size_t i = 0; i < state.bitmaps->size(); ++i)
        consider(state.bitmaps->table_run(state.bitmaps->entry(i)));
    return most;
}

void move_bitmaps(State &state, HostCluster end, std::uint64_t most) {
    if (!state.bitmaps || !state.bitmaps->count())
        return;
    // What must be adjacent first, while there is room; the stored bits are pointed to by the tables.
    move_tables(state, end);
    move_directory(state, end);
    move_stored(state, end, most);
}

} // namespace qlean
