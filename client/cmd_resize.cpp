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

#include <cerrno>

namespace qlean {

namespace {

// Somebody else is running maintenance, and that is why.
bool is_busy(const Target &target, int error) {
    try {
        return error == EPERM && StatusPage::fetch(target).owner();
    } catch (const Failure &) {
        return false;
    }
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
        connection.wait(resize);
        if (resize.error == 0) {
            connection.start_flush(commit);
            connection.wait(commit);
        }
        if (connection.lost()) {
            throw Failure(fmt::format("the connection to {} is lost{}", target.name(), target.server_words()),
                          ExitCode::server_gone);
        }
        if (const int error = resize.error != 0 ? resize.error : commit.error) {
            connection.close();
            throw Failure(server_says(target, error), is_busy(target, error) ? ExitCode::busy : ExitCode::error);
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
