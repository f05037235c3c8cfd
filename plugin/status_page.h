// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The status page: one JSON object in a page of fixed size. Its fields are documented in nbdkit-qcow2-plugin(1).
#pragma once

#include "server.h"

#include <string>

namespace qlean::plugin {

/// Walks the image's tables for the numbers that need it, unless that was done a moment ago or is being done.
void measure_status(Server &server);
/// Exactly page_size bytes.
std::string make_status_page(Server &server);

} // namespace qlean::plugin
