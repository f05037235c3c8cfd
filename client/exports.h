// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Which exports of a server are maintenance operations, in the order in which they make sense.
#pragma once

#include <string>
#include <vector>

namespace qlean {

class Target;

// From the server's list; servers that hide their list are assumed to have what the plugin always offers.
std::vector<std::string> maintenance_exports(const Target &target);
// Throws Failure for the name of a disk or a page.
void require_operation(const std::string &name);

} // namespace qlean
