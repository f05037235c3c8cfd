// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Reading and amending the status page.

#include "filter/status.h"

#include <nlohmann/json.hpp>

namespace qlean {

namespace {

// Ordered, so that the page reads as the plugin wrote it.
using Json = nlohmann::ordered_json;

Json parse(std::string_view page) { return Json::parse(page.begin(), page.end(), nullptr, false); }

} // namespace

std::optional<std::string> with_reclaim_status(std::string_view page, const ReclaimStatus &status) {
    Json json = parse(page);
    if (!json.is_object())
        return std::nullopt;
    json["reclaim"] = Json{{"granularity", status.granularity},
                           {"recorded_bytes", status.recorded_bytes},
                           {"ready_bytes", status.ready_bytes},
                           {"given_back_bytes", status.given_back_bytes}};
    std::string text = json.dump();
    if (text.size() >= page.size())
        return std::nullopt;
    text.resize(page.size() - 1, ' ');
    text += '\n';
    return text;
}

std::optional<std::uint64_t> cluster_size_in(std::string_view page) {
    const Json json = parse(page);
    if (!json.is_object() || !json.contains("image"))
        return std::nullopt;
    const Json &image = json["image"];
    if (!image.is_object() || !image.contains("cluster_size") || !image["cluster_size"].is_number_unsigned())
        return std::nullopt;
    return image["cluster_size"].get<std::uint64_t>();
}

} // namespace qlean
