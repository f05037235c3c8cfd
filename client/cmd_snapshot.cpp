// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// `qlean snapshot list` and `qlean snapshot delete`: internal snapshots of an image that is in use, or of a file.
#include "connection.h"
#include "failure.h"
#include "json_page.h"
#include "options.h"
#include "status_page.h"
#include "target.h"
#include "units.h"

#include <fmt/chrono.h>
#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <cerrno>

namespace qlean {

namespace {

using json = nlohmann::ordered_json;

json read_page(const Target &target) {
    Connection connection(target, "snapshots");
    const json page = read_json_page(connection);
    if (const auto list = page.find("snapshots"); list == page.end() || !list->is_array()) {
        throw Failure(fmt::format("{} answers export 'snapshots' with something else than a list of snapshots; its "
                                  "version may not fit to this qlean",
                                  target.name()));
    }
    return page;
}

std::string show_date(const json &snapshot) {
    const auto seconds = static_cast<std::time_t>(snapshot.value("date", std::uint64_t{0}));
    return fmt::format("{:%Y-%m-%d %H:%M:%S}", fmt::localtime(seconds));
}

void print_table(const json &page) {
    fmt::print("{:<6} {:<28} {:<19} {:>14} {:>14}\n", "id", "name", "date", "VM state", "disk");
    for (const auto &s : page["snapshots"]) {
        fmt::print("{:<6} {:<28} {:<19} {:>14} {:>14}\n", printable(s.value("id", "")), printable(s.value("name", "")),
                   show_date(s), show_bytes(s.value("vm_state_size", std::uint64_t{0})),
                   show_bytes(s.value("disk_size", std::uint64_t{0})));
    }
    if (const auto more = page.value("left_off", std::uint64_t{0}); more != 0) {
        fmt::print("and {} more\n", more);
    }
}

} // namespace

ExitCode run_snapshot_list(const SnapshotOptions &options) {
    Target target(options.target, Access::read_only, options.nbdkit);
    const json page = read_page(target);
    if (options.json) {
        fmt::print("{}\n", page.dump(2, ' ', false, json::error_handler_t::replace));
    } else {
        print_table(page);
    }
    target.finish();
    return ExitCode::done;
}

ExitCode run_snapshot_delete(const SnapshotOptions &options) {
    Target target(options.target, Access::read_write, options.nbdkit);
    {
        const json page = read_page(target);
        const auto &all = page["snapshots"];
        const bool known = std::any_of(all.begin(), all.end(), [&](const json &s) {
            return s.value("name", "") == options.name || s.value("id", "") == options.name;
        });
        if (!known && page.value("left_off", std::uint64_t{0}) == 0) {
            throw Failure(fmt::format("{} has no snapshot '{}'; 'qlean snapshot list' shows what there is",
                                      target.name(), options.name));
        }
    }
    Connection connection(target, "snapshot-delete/" + options.name);
    if (!connection.can_cache()) {
        throw Failure(
            fmt::format("the server does not let snapshot '{}' be deleted: it was started read-only (-r), or a "
                        "filter hides NBD_CMD_CACHE; restart it without",
                        options.name));
    }
    Ticket ticket;
    connection.start_cache(0, std::min<std::uint64_t>(connection.size(), 65536), ticket);
    connection.wait(ticket);
    if (ticket.error == 0) {
        connection.start_flush(ticket);
        connection.wait(ticket);
    }
    if (ticket.error != 0) {
        const int error = ticket.error;
        const bool lost = connection.lost();
        connection.close();
        throw Failure(fmt::format("cannot delete snapshot '{}': {}", options.name,
                                  lost ? "the connection to the server was lost" : server_says(target, error)),
                      lost             ? ExitCode::server_gone
                      : error == EPERM ? ExitCode::busy
                                       : ExitCode::error);
    }
    connection.close();
    target.finish();
    return ExitCode::done;
}

} // namespace qlean
