// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// `qlean resize`: CACHE and FLUSH on the export that is named after the new size, then a look whether the disk has it.
#include "connection.h"
#include "failure.h"
#include "options.h"
#include "status_page.h"
#include "target.h"
#include "units.h"

#include <fmt/format.h>

#include <cstring>

namespace qlean {

namespace {

constexpr int poll_milliseconds = 1000;

void wait_for(Connection &connection, const Ticket &ticket) {
    while (!ticket.done && !connection.lost()) {
        connection.pump(poll_milliseconds);
    }
}

// The server's own sentence about what went wrong: only an errno comes over the wire.
std::string reason(const Target &target, int error) {
    std::string text;
    try {
        text = StatusPage::fetch(target).last_error();
    } catch (const Failure &) {
    }
    return text.empty() ? std::strerror(error) : text;
}

} // namespace

ExitCode run_resize(const ResizeOptions &options) {
    Target target(options.target, Access::read_write, options.nbdkit);
    const std::uint64_t before = Connection(target, "").size();
    const std::uint64_t wanted = options.relative ? before + options.bytes : options.bytes;
    if (wanted < before && options.relative) {
        throw Failure("the disk cannot become that large", ExitCode::usage);
    }
    {
        Connection connection(target, fmt::format("resize/{}", wanted));
        if (!connection.can_cache()) {
            throw Failure(fmt::format("{} is served read-only, so its disk cannot be resized", target.name()));
        }
        Ticket resize, commit;
        connection.start_cache(0, 1, resize);
        wait_for(connection, resize);
        if (resize.done && resize.error == 0) {
            connection.start_flush(commit);
            wait_for(connection, commit);
        }
        if (!resize.done || (resize.error == 0 && !commit.done)) {
            throw Failure(fmt::format("the connection to {} is lost{}", target.name(), target.server_words()));
        }
        if (const int error = resize.error != 0 ? resize.error : commit.error) {
            throw Failure(reason(target, error));
        }
    }
    const std::uint64_t now = Connection(target, "").size();
    if (now != wanted) {
        throw Failure(fmt::format("the disk has {} bytes after the server made it {} bytes large", now, wanted));
    }
    fmt::print("{} -> {} ({} bytes). Clients that are connected see the new size when they connect again.\n",
               show_bytes(before), show_bytes(now), now);
    target.finish();
    return ExitCode::done;
}

} // namespace qlean
