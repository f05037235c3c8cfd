// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Finds nbdkit's modules: a binary run from the build tree uses the modules of the same build tree, an installed one
// lets nbdkit search its own directories by name.
#pragma once

#include <string>

namespace qlean {

// What to put on nbdkit's command line for the plugin and for --filter.
std::string plugin_module();
std::string filter_module();

// Absolute, without resolving symbolic links in the last component (a socket need not exist yet).
std::string absolute_path(const std::string &path);

} // namespace qlean
