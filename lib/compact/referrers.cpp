// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "referrers.h"

#include <shared_mutex>

namespace qlean {

namespace {

L2Words read_entry(State &state, HostOffset at) {
    std::uint64_t words[2] = {0, 0};
    state.snapshots.pending.read(at, std::span(words).first(state.geometry.entry_words()));
    return {words[0], words[1]};
}

HostOffset entry_home(const Geometry &g, HostOffset table, GuestCluster c) {
    return table + g.l2_index(c) * g.entry_words() * 8;
}

} // namespace

void warm_referrers(State &state, GuestCluster c) {
    const Geometry &g = state.geometry;
    if (c.value < g.guest_clusters())
        (void)state.mapper.look(c);
    if (!state.snapshots.any())
        return;
    std::vector<HostOffset> tables;
    {
        const std::shared_lock guard(state.l1.lock(g.l1_index(c)));
        for (const auto &snapshot : state.snapshots.list())
            if (const HostOffset table = snapshot->table(g.l1_index(c));
                table.value != 0 && std::find(tables.begin(), tables.end(), table) == tables.end())
                tables.push_back(table);
    }
    for (const HostOffset table : tables) // one may have moved meanwhile: then this was in vain
        (void)read_entry(state, entry_home(g, table, c));
}

std::optional<Referrers> find_referrers(State &state, GuestCluster c,
                                        const std::function<bool(const Mapping &)> &refers) {
    const Geometry &g = state.geometry;
    Referrers found;
    Mapping m;
    if (c.value < g.guest_clusters()) {
        m = state.mapper.look(c);
        found.active = refers(m);
        if (found.active && state.mapper.claims_metadata(m))
            return std::nullopt;
    } else if (g.l1_index(c) < state.l1.size() && state.mapper.has_table(c)) {
        state.mapper.survey(c, std::span(&m, 1));
        if (refers(m))
            return std::nullopt;
    }
    if (!state.snapshots.any())
        return found;
    // Most snapshots share their tables: each is asked once.
    const std::shared_lock guard(state.l1.lock(g.l1_index(c)));
    std::vector<std::pair<HostOffset, bool>> asked;
    for (const auto &snapshot : state.snapshots.list()) {
        const HostOffset table = snapshot->table(g.l1_index(c));
        if (table.value == 0)
            continue;
        auto known = std::find_if(asked.begin(), asked.end(), [&](const auto &a) { return a.first == table; });
        if (known == asked.end())
            known = asked.insert(asked.end(),
                                 {table, refers(state.mapper.judged(c, read_entry(state, entry_home(g, table, c))))});
        if (known->second)
            found.snapshots.push_back(snapshot);
    }
    return found;
}

void change_all(State &state, GuestCluster c, const Referrers &referrers,
                const std::function<std::uint64_t(std::uint64_t)> &changed, const std::function<void()> &before) {
    const Geometry &g = state.geometry;
    const std::uint64_t i = g.l1_index(c);
    std::optional<Mapper::Editor> editor;
    std::optional<std::shared_lock<RwLock>> l1_guard; // an editor holds it too
    if (referrers.active)
        editor.emplace(state.mapper, c, 1);
    else
        l1_guard.emplace(state.l1.lock(i));
    struct Change {
        HostOffset at;
        std::uint64_t word;
    };
    std::vector<Change> changes;
    for (const auto &snapshot : referrers.snapshots) {
        const HostOffset at = entry_home(g, snapshot->table(i), c);
        if (std::none_of(changes.begin(), changes.end(), [&](const Change &change) { return change.at == at; }))
            changes.push_back({at, changed(read_entry(state, at).entry)});
    }
    before();
    if (editor) {
        L2Words words = editor->words(c);
        words.entry = changed(words.entry);
        editor->set_words(c, words);
    }
    // What a snapshot read may be in memory, too, if the active image does not have it.
    state.compressed.forget(c);
    // Where a snapshot shares the table with the active image the word is in both places, and stays pending for the
    // snapshot's sake if the active image gets a table of its own before it is written.
    for (const Change &change : changes)
        state.snapshots.pending.store(change.at, change.word);
}

} // namespace qlean
