// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Reading never fails on a strange field: a server newer than we are is no error. Only a page that is not a JSON object
// is.
#include "status_page.h"

#include "connection.h"
#include "failure.h"
#include "json_page.h"

#include <cstdio>
#include <cstring>

namespace qlean {

StatusPage StatusPage::read(Connection &connection) {
    StatusPage page;
    page.json_ = read_json_page(connection);
    return page;
}

StatusPage StatusPage::fetch(const Target &target) {
    Connection connection(target, "status");
    return read(connection);
}

const nlohmann::ordered_json *StatusPage::find(std::initializer_list<const char *> path) const {
    const nlohmann::ordered_json *node = &json_;
    for (const char *key : path) {
        if (!node->is_object()) {
            return nullptr;
        }
        const auto it = node->find(key);
        if (it == node->end()) {
            return nullptr;
        }
        node = &*it;
    }
    return node;
}

std::optional<std::uint64_t> StatusPage::number(std::initializer_list<const char *> path) const {
    const auto *node = find(path);
    if (node == nullptr || !node->is_number_integer() ||
        (!node->is_number_unsigned() && node->get<std::int64_t>() < 0)) {
        return std::nullopt;
    }
    return node->get<std::uint64_t>();
}

std::string StatusPage::text(std::initializer_list<const char *> path) const {
    const auto *node = find(path);
    return node != nullptr && node->is_string() ? node->get<std::string>() : "";
}

bool StatusPage::flag(std::initializer_list<const char *> path) const {
    const auto *node = find(path);
    return node != nullptr && node->is_boolean() && node->get<bool>();
}

std::uint64_t StatusPage::cluster_size() const {
    const auto size = number({"image", "cluster_size"});
    // Used for alignment and arithmetic: only what a QCOW2 image can have.
    const bool sane = size && *size >= 512 && *size <= 2 * 1048576 && (*size & (*size - 1)) == 0;
    return sane ? *size : 65536;
}

std::optional<double> StatusPage::guest_p99_us() const {
    const auto *node = find({"guest", "latency_us", "p99"});
    return node != nullptr && node->is_number() ? std::optional(node->get<double>()) : std::nullopt;
}

std::optional<Owner> StatusPage::owner() const {
    const auto *node = find({"maintenance", "owner"});
    if (node == nullptr || !node->is_object()) {
        return std::nullopt;
    }
    const auto connection = number({"maintenance", "owner", "connection"});
    return Owner{text({"maintenance", "owner", "export"}), connection.value_or(0)};
}

Measures StatusPage::measures() const {
    Measures m;
    m.length = number({"file", "length"});
    m.allocated = number({"file", "allocated"});
    m.clusters = number({"clusters", "in_use"});
    if (m.clusters) {
        m.in_use_bytes = *m.clusters * cluster_size();
    }
    const auto allocated = number({"fragmentation", "allocated"});
    const auto fragmented = number({"fragmentation", "fragmented"});
    if (allocated && fragmented) {
        m.fragmentation =
            *allocated == 0 ? 0.0 : 100.0 * static_cast<double>(*fragmented) / static_cast<double>(*allocated);
    }
    return m;
}

unsigned StatusPage::depth() const {
    // 16 requests would occupy every worker thread nbdkit has for a connection. Before 1.34, nbdkit aborts when a
    // client dies with more than one in flight; a server that does not tell its version gets the same care.
    constexpr unsigned pipelined = 15;
    int major = 0;
    int minor = 0;
    const std::string version = text({"server", "nbdkit"});
    const bool known = std::sscanf(version.c_str(), "%d.%d", &major, &minor) == 2;
    return known && (major > 1 || (major == 1 && minor >= 34)) ? pipelined : 1;
}

std::string StatusPage::error_since(const StatusPage &then) const {
    const auto errors = number({"errors"});
    return errors && errors == then.number({"errors"}) ? "" : last_error();
}

nlohmann::ordered_json to_json(const Measures &measures) {
    nlohmann::ordered_json j;
    const auto put = [&j](const char *name, const auto &value) {
        j[name] = value ? nlohmann::ordered_json(*value) : nlohmann::ordered_json();
    };
    put("length", measures.length);
    put("allocated", measures.allocated);
    put("clusters_in_use", measures.clusters);
    put("in_use", measures.in_use_bytes);
    put("fragmentation_percent", measures.fragmentation);
    return j;
}

std::string server_says(const Target &target) {
    try {
        return StatusPage::fetch(target).last_error();
    } catch (const Failure &) {
        return {};
    }
}

std::string server_says(const Target &target, int error) {
    const std::string said = server_says(target);
    return said.empty() ? std::strerror(error) : said;
}

} // namespace qlean
