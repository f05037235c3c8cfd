// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "bitmap_moves.h"

#include "whole_moves.h"

namespace qlean {

namespace {

void move_stored(State &state, HostCluster end, std::uint64_t most) {
    Bitmaps &bitmaps = *state.bitmaps;
    std::vector<WholeMove> moves;
    std::vector<std::pair<std::size_t, std::uint64_t>> places; // of each: the bitmap, and the word of its table
    for (std::size_t i = 0; i < bitmaps.size(); ++i) {
        const auto table = bitmaps.read_table(bitmaps.entry(i));
        for (std::uint64_t w = 0; w < table.size() && moves.size() < most; ++w) {
            const BitmapWord word = BitmapWord::decode(table[w], state.geometry);
            if (word.kind != BitmapWord::Kind::stored || word.host < end)
                continue;
            auto room = state.allocator.reserve_below(1, end);
            if (room.empty())
                break;
            moves.push_back({{word.host, 1}, std::move(room)});
            places.emplace_back(i, w);
        }
    }
    carry_out(state, moves, [&](const std::vector<HostCluster> &to) {
        std::vector<std::pair<std::uint64_t, HostCluster>> words;
        for (std::size_t n = 0; n < moves.size(); ++n) {
            words.emplace_back(places[n].second, to[n]);
            if (n + 1 == moves.size() || places[n + 1].first != places[n].first)
                bitmaps.switch_stored(places[n].first, std::exchange(words, {}));
        }
    });
}

void move_tables(State &state, HostCluster end) {
    Bitmaps &bitmaps = *state.bitmaps;
    std::vector<WholeMove> moves;
    std::vector<std::size_t> moving; // the bitmap of each
    for (std::size_t i = 0; i < bitmaps.size(); ++i) {
        const HostRun run = bitmaps.table_run(bitmaps.entry(i));
        if (!beyond(run, end))
            continue;
        auto room = state.allocator.reserve_contiguous_below(run.count, end);
        if (room.empty())
            continue;
        moves.push_back({run, std::move(room)});
        moving.push_back(i);
    }
    carry_out(state, moves, [&](const std::vector<HostCluster> &to) {
        for (std::size_t n = 0; n < moves.size(); ++n)
            bitmaps.switch_table(moving[n], state.geometry.offset_of(to[n]));
    });
}

void move_directory(State &state, HostCluster end) {
    const HostRun run = state.bitmaps->directory_run();
    if (!beyond(run, end))
        return;
    auto room = state.allocator.reserve_contiguous_below(run.count, end);
    if (room.empty())
        return;
    std::vector<WholeMove> moves;
    moves.push_back({run, std::move(room)});
    carry_out(state, moves, [&](const std::vector<HostCluster> &to) {
        state.bitmaps->switch_directory(state.geometry.offset_of(to.front()));
    });
}

} // namespace

std::uint64_t bitmap_clusters_beyond(State &state, HostCluster end) {
    std::uint64_t n = 0;
    if (!state.bitmaps)
        return n;
    state.write_back.lead([&] { state.bitmaps->each_run([&](HostRun run) { n += clusters_beyond(run, end); }); });
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
