// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The plugin's parameters, and the one thing of nbdkit's own command line that must be known before a client connects.
#pragma once

#include "lib/check/report.h"
#include "lib/secret.h"
#include "maintainers.h"

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

namespace qlean::plugin {

struct Options {
    std::string file;                             ///< absolute
    std::string data_file;                        ///< absolute; empty: as the image says
    std::uint64_t cache_bytes = 64 * 1024 * 1024; ///< of L2 tables kept in memory
    std::shared_ptr<const Secret> passphrase;     ///< of an encrypted image; may be null
    bool read_only = false;                       ///< nbdkit -r
    std::optional<Repair> repair;                 ///< before serving; nothing: what QEMU does
    Maintainers maintainers;                      ///< who may open more than the disk and the status page
    bool check_only = false;                      ///< serve the verdict on the image, not the image

    /// Takes one key=value. Throws Error naming an unknown key or a bad value.
    void set(const std::string &key, const std::string &value);
    /// Throws Error if something needed is missing.
    void complete();
};

/// Whether this process was started with -r. nbdkit tells a plugin only when a client connects, but the image must be
/// opened, locked and judged before.
bool started_read_only();

/// The version of the nbdkit that runs this plugin, such as "1.32.5": one build serves many.
std::string running_nbdkit_version();

} // namespace qlean::plugin
