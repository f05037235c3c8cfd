// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Sound images of every kind, small, for fuzz-image to alter; and where their structures are, so that what it alters
// means something.
#pragma once

#include "tests/fault/image_builder.h"

#include <map>
#include <string>

namespace qlean::fuzz {

using fault::Bytes;

struct Region {
    std::uint64_t at, length;
};

struct ImageCase {
    const char *name;
    Bytes bytes;
    Bytes data;                  ///< of the external data file; empty: it has none
    std::vector<Region> regions; ///< header, tables, blocks, directories
    std::uint64_t leaks = 0;     ///< clusters, as the check counts them
    std::map<std::string, Bytes> snapshots = {};
    bool judged = true; ///< the judge of tests/fault knows all of its features
};

/// Made once.
const std::vector<ImageCase> &image_cases();

/// What the image says beside the guest's data, as far as it makes sense.
std::vector<Region> regions_of(const Bytes &image);

} // namespace qlean::fuzz
