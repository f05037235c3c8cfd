// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "json_page.h"

#include "connection.h"
#include "failure.h"

#include <fmt/format.h>

namespace qlean {

nlohmann::ordered_json read_json_page(Connection &connection) {
    constexpr std::uint64_t largest = 16 * 1048576; // a real page has 64 KiB; anything huge is a disk of that name
    constexpr int deepest = 100;                    // printing recurses
    const std::string &name = connection.export_name();
    if (connection.size() == 0 || connection.size() > largest) {
        throw Failure(fmt::format("the export '{}' has {} bytes, which is no page of text; is this server nbdkit with "
                                  "the qcow2 plugin of qlean?",
                                  name, connection.size()));
    }
    const std::string text = connection.read(0, connection.size());
    // A page padded with zero bytes instead of spaces is accepted too.
    const auto keep_shallow = [&](int depth, auto, auto &) {
        if (depth > deepest) {
            throw Failure(fmt::format("the export '{}' holds JSON that is nested too deeply to be a page of the qcow2 "
                                      "plugin",
                                      name));
        }
        return true;
    };
    auto page = nlohmann::ordered_json::parse(text.substr(0, text.find('\0')), keep_shallow, false);
    if (!page.is_object()) {
        throw Failure(fmt::format("the export '{}' does not contain a JSON object; is this server nbdkit with the "
                                  "qcow2 plugin of qlean?",
                                  name));
    }
    return page;
}

} // namespace qlean
