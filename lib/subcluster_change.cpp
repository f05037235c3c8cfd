// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "subcluster_change.h"

namespace qlean::subclusters {

bool set_subclusters(State &state, Mapper::Editor &editor, GuestCluster c, const Mapping &mapping, Bitmap after,
                     bool keep_host, std::vector<HostRun> &freed) {
    if (mapping.has_host() && (after.data() != 0 || keep_host)) {
        editor.set_words(c, {editor.words(c).entry, after.word()});
        return true;
    }
    if (state.contents.ends_below(c))
        editor.set_unallocated(c);
    else
        editor.set_words(c, {0, after.word()});
    state.mapper.append_references(freed, mapping);
    return false;
}

void punch_all_but(State &state, HostCluster host, Set used) {
    Grid(state.geometry).each_run(~used, [&](std::uint64_t begin, std::uint64_t length) {
        const std::uint64_t from = round_up(begin, host_block), to = round_down(begin + length, host_block);
        if (from < to)
            state.data.punch_if_possible(state.geometry.offset_of(host) + from, to - from);
    });
}

} // namespace qlean::subclusters
