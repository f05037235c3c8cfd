// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// /proc/self/exe is the running binary whatever argv[0] or PATH say.
#include "paths.h"

#include <filesystem>
#include <system_error>

namespace qlean {

namespace fs = std::filesystem;

namespace {

std::string beside_the_binary(const char *directory, const char *file, const char *name) {
    std::error_code ignored;
    const fs::path self = fs::read_symlink("/proc/self/exe", ignored);
    const fs::path candidate = self.parent_path().parent_path() / directory / file;
    return !self.empty() && fs::is_regular_file(candidate, ignored) ? candidate.string() : name;
}

} // namespace

std::string plugin_module() { return beside_the_binary("plugin", "nbdkit-qcow2-plugin.so", "qcow2"); }

std::string filter_module() { return beside_the_binary("filter", "nbdkit-reclaim-filter.so", "reclaim"); }

std::string absolute_path(const std::string &path) { return fs::absolute(path).string(); }

} // namespace qlean
