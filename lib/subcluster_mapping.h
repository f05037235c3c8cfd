// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// What a mapping says of each subcluster. Pure.
//
// Whatever looks at part of a mixed cluster sees pieces of clusters that are not mixed (each_piece), so that only
// changes have to know bitmaps.
#pragma once

#include "l2_entry.h"
#include "subclusters.h"

namespace qlean::subclusters {

/// The bitmap that says what `mapping`, which is not damaged, says. A compressed cluster holds all of its data.
inline Bitmap bitmap_of(const Mapping &mapping) {
    using Of = Mapping::Kind;
    switch (mapping.kind) {
    case Of::data:
    case Of::compressed:
        return all_data;
    case Of::zero:
    case Of::zero_allocated:
        return all_zero;
    case Of::mixed:
    case Of::mixed_allocated:
        return Bitmap(mapping.bits);
    case Of::unallocated:
    case Of::damaged:
        break;
    }
    return {};
}

/// `mapping`, if all of its subclusters were of this kind.
inline Mapping uniform(const Mapping &mapping, Kind kind) {
    Mapping m = mapping;
    m.bits = 0;
    switch (kind) {
    case Kind::data:
        m.kind = Mapping::Kind::data;
        break;
    case Kind::zero:
        m.kind = mapping.has_host() ? Mapping::Kind::zero_allocated : Mapping::Kind::zero;
        break;
    case Kind::unallocated:
        return {};
    }
    return m;
}

/// Calls f(mapping, within, length) for the pieces of [within, within + length) of a cluster: one, unless it is mixed.
template <class F>
void each_piece(const Geometry &geometry, const Mapping &mapping, std::uint64_t within, std::uint64_t length, F &&f) {
    if (!mapping.is_mixed())
        return f(mapping, within, length);
    Grid(geometry).each_run(Bitmap(mapping.bits), within, length,
                            [&](Kind kind, std::uint64_t at, std::uint64_t n) { f(uniform(mapping, kind), at, n); });
}

} // namespace qlean::subclusters
