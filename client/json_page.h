// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// What the server tells as a JSON object that fills an export: its status, its verdict, its snapshots.
#pragma once

#include <nlohmann/json.hpp>

namespace qlean {

class Connection;

// All of the export, read in one request. Throws if it is no such page.
nlohmann::ordered_json read_json_page(Connection &connection);

} // namespace qlean
