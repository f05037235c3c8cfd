// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The ideal end of an image and what of its metadata is not where it should be for it. Pure arithmetic over counts
// that the caller took.
#pragma once

#include "../state.h"

namespace qlean {

struct Layout {
    HostCluster end;                  ///< E
    std::uint64_t last_region = 0;    ///< the last region that keeps a refcount block
    std::uint64_t table_clusters = 0; ///< of the refcount table, when done
    std::uint64_t pending = 0;        ///< clusters without a guest offset that still move or go

    /// `live`: clusters in use, or that will be; of these `leaked` are about to be given back, and `empty_tables` are
    /// L2 tables about to go. Every free map is loaded.
    static Layout measure(State &state, std::uint64_t live, std::uint64_t leaked, std::uint64_t empty_tables);
};

} // namespace qlean
