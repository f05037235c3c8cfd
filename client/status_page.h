// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The server's `status` export: one JSON object, read in one request, so all its numbers belong to one moment.
// A field that is missing or null is unknown; a field we do not know is kept and ignored.
#pragma once

#include <nlohmann/json.hpp>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

namespace qlean {

class Connection;
class Target;

struct Owner {
    std::string operation;
    std::uint64_t connection = 0;
};

// What `compact` reports before and after.
struct Measures {
    std::optional<std::uint64_t> length;
    std::optional<std::uint64_t> allocated;
    std::optional<std::uint64_t> clusters;
    std::optional<std::uint64_t> in_use_bytes;
    std::optional<double> fragmentation;
};

class StatusPage {
  public:
    // Over a connection that is already open: cheap, but the server counts clusters only for new connections.
    static StatusPage read(Connection &connection);
    // Over a connection of its own: exact numbers.
    static StatusPage fetch(const Target &target);

    const nlohmann::ordered_json &json() const { return json_; }

    std::optional<std::uint64_t> number(std::initializer_list<const char *> path) const;
    std::string text(std::initializer_list<const char *> path) const; // empty if missing

    std::uint64_t cluster_size() const; // 64 KiB if the server does not say
    std::optional<std::uint64_t> ideal_end() const { return number({"compact", "ideal_end"}); }
    std::optional<std::uint64_t> pending() const { return number({"compact", "pending"}); }
    // What one request on `compact` does at the most, if the server says: then it may be asked for any range.
    std::optional<std::uint64_t> most_by_request() const { return number({"compact", "most_by_request"}); }
    std::optional<Owner> owner() const;
    std::string last_error() const { return text({"last_error"}); }
    // The same, unless the server says that it is from before `then`.
    std::string error_since(const StatusPage &then) const;
    // Of the guest's requests in the last second or so; nothing if it made none, or the server does not say.
    std::optional<double> guest_p99_us() const;
    bool flag(std::initializer_list<const char *> path) const;
    Measures measures() const;

    // How many requests may be in flight on one connection to this server.
    unsigned depth() const;

  private:
    const nlohmann::ordered_json *find(std::initializer_list<const char *> path) const;

    nlohmann::ordered_json json_;
};

nlohmann::ordered_json to_json(const Measures &measures);

// The server's last error, or an empty string.
std::string server_says(const Target &target);
// Why a request failed with ERROR, in the server's own words if they can be had: only a number comes over the wire.
std::string server_says(const Target &target, int error);

} // namespace qlean
