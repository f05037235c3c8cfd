// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Everything that is neither a disk, nor a snapshot, nor a page to read is an operation: new ones need no new client.
#include "exports.h"

#include "connection.h"
#include "failure.h"

#include <fmt/format.h>

#include <algorithm>

namespace qlean {

namespace {

bool is_operation(const std::string &name) {
    return !name.empty() && name != "status" && name != "check" && name != "snapshots" &&
           name.rfind("snapshot/", 0) != 0;
}

} // namespace

void require_operation(const std::string &name) {
    if (!is_operation(name)) {
        throw Failure(fmt::format("export '{}' is no operation, so it has no plan; 'qlean plan TARGET' shows all that "
                                  "have one",
                                  name));
    }
}

std::vector<std::string> maintenance_exports(const Target &target) {
    std::vector<std::string> names = Connection::list_exports(target);
    require_maintainer(names);
    std::erase_if(names, [](const std::string &name) { return !is_operation(name); });
    if (names.empty()) { // it hides its list
        return {"zeroes", "compact"};
    }
    // Space is given back first, what became zero then, and the rest is moved together last.
    const std::vector<std::string> first = {"reclaim", "zeroes", "compact"};
    const auto place = [&](const std::string &name) {
        return std::find(first.begin(), first.end(), name) - first.begin();
    };
    std::stable_sort(names.begin(), names.end(),
                     [&](const std::string &a, const std::string &b) { return place(a) < place(b); });
    return names;
}

} // namespace qlean
