// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The exports of internal snapshots: each as a read-only disk, the page that lists them, the deletion of one.
#pragma once

#include "exports.h"

namespace qlean::plugin {

/// "snapshot/NAME" for each snapshot, or its id where the name does not tell it from others.
std::vector<std::string> snapshot_export_names(Server &server);

/// `name` without "snapshot/". Throws Error if there is no such snapshot.
std::unique_ptr<Export> open_snapshot_export(Server &server, const std::string &name);
std::unique_ptr<Export> open_snapshots_page(Server &server);

} // namespace qlean::plugin
