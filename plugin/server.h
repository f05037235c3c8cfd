// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// What the connections of one server share.
#pragma once

#include "gate.h"
#include "guest_stats.h"
#include "lib/compact/maintenance.h"
#include "lib/compact/survey.h"
#include "lib/image.h"
#include "lib/posix_file.h"
#include "options.h"

#include <memory>

namespace qlean::plugin {

struct Server {
    Options options;
    std::string nbdkit_version; ///< of the server that runs, not the one this was built for
    std::unique_ptr<Image> image;
    std::unique_ptr<PosixFile> checked;  ///< instead of an image: a file that is only checked
    std::optional<CheckReport> repaired; ///< what was fixed of it, and what is left
    MoveOwnership ownership;
    Gauges gauges;
    GuestStats stats;
    GuestStats reclaim_stats; ///< requests of the reclaim filter's own, which are no guest's
    Gate gate;
    std::atomic<std::uint64_t> connections{0};
    std::atomic<std::uint64_t> resizes{0}; ///< so far; changed by a request that is alone
};

/// The process's one server, as nbdkit has one plugin.
Server &server();

} // namespace qlean::plugin
