// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// What stands in for nbdkit and for the network in fuzz-texts.
#pragma once

#include "client/connection.h"
#include "plugin/server.h"

#include <memory>
#include <string>

namespace qlean::fuzz {

/// A server of the plugin's, with an image that has snapshots. Made once.
plugin::Server &served_image();

/// What the server at the other end of every Connection has: as a page this text; as block status what its bytes say.
std::string &served_text();
/// To an export of that size.
std::unique_ptr<Connection> connect(std::uint64_t size);

} // namespace qlean::fuzz
