// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// `qlean status`: the server's status page, for people or verbatim as JSON. Changes nothing.
#include "options.h"
#include "status_page.h"
#include "target.h"
#include "units.h"

#include <fmt/format.h>

namespace qlean {

namespace {

void line(const char *label, const std::string &value) { fmt::print("{:<20}{}\n", label, value); }

std::string clusters(const StatusPage &page, const Measures &measures) {
    if (!measures.in_use_bytes) {
        return "unknown";
    }
    std::string text = fmt::format("{} ({} clusters", show_bytes(*measures.in_use_bytes), *measures.clusters);
    for (const char *kind : {"data", "metadata", "pinned", "retired", "free"}) {
        if (const auto count = page.number({"clusters", kind})) {
            text += fmt::format(", {} {}", kind, *count);
        }
    }
    return text + ")";
}

std::string savings(const StatusPage &page, const Measures &measures) {
    if (!measures.length) {
        return "unknown";
    }
    const auto saved = [&](std::uint64_t end) {
        return show_bytes(*measures.length > end ? *measures.length - end : 0);
    };
    if (const auto end = page.ideal_end()) {
        return fmt::format("{} (file length down to {})", saved(*end), show_bytes(*end));
    }
    if (measures.in_use_bytes) {
        return fmt::format("about {} ('qlean plan' computes it exactly)", saved(*measures.in_use_bytes));
    }
    return "unknown ('qlean plan' computes it)";
}

void print_page(const Target &target, const StatusPage &page) {
    const Measures measures = page.measures();
    const std::string file = page.text({"image", "file"});
    line("image", file.empty() ? target.name() : file);
    if (const std::string below = page.text({"image", "backing", "file"}); !below.empty()) {
        const auto depth = page.number({"image", "backing", "depth"}).value_or(1);
        line("backing file", depth > 1 ? fmt::format("{} ({} deep)", below, depth) : below);
    }
    line("virtual size", show_bytes(page.number({"image", "virtual_size"})));
    line("cluster size", fmt::format("{} KiB", static_cast<double>(page.cluster_size()) / 1024));
    line("file length", show_bytes(measures.length));
    line("allocated on host", show_bytes(measures.allocated));
    if (const std::string data = page.text({"data_file", "file"}); !data.empty()) {
        line("data file",
             fmt::format("{}{}, {} long, {} allocated on host", data, page.flag({"data_file", "raw"}) ? " (raw)" : "",
                         show_bytes(page.number({"data_file", "length"})),
                         show_bytes(page.number({"data_file", "allocated"}))));
    }
    line("in use", clusters(page, measures));
    line("compact would save", savings(page, measures));
    if (const auto recorded = page.number({"reclaim", "recorded_bytes"})) {
        line("discards recorded", fmt::format("{}, {} ready to give back", show_bytes(*recorded),
                                              show_bytes(page.number({"reclaim", "ready_bytes"}))));
    }
    line("fragmentation", measures.fragmentation ? fmt::format("{:.2f} %", *measures.fragmentation) : "unknown");
    const auto owner = page.owner();
    line("maintenance",
         owner ? fmt::format("'{}' is run by connection {}", owner->operation, owner->connection) : "idle");
    const std::string nbdkit = page.text({"server", "nbdkit"});
    const std::string version = page.text({"version"});
    line("server",
         fmt::format("qlean {}, nbdkit {}{}", version.empty() ? "(unknown)" : version,
                     nbdkit.empty() ? "(unknown)" : nbdkit, page.flag({"server", "read_only"}) ? ", read-only" : ""));
    if (page.flag({"poisoned"})) {
        line("POISONED", "a write to the image failed; every later write is refused until the server is restarted");
    }
    const std::string error = page.last_error();
    line("last error", error.empty() ? "none" : error);
}

} // namespace

ExitCode run_status(const StatusOptions &options) {
    Target target(options.target, Access::read_only, options.nbdkit);
    const StatusPage page = StatusPage::fetch(target);
    if (options.json) {
        fmt::print("{}\n", page.json().dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace));
    } else {
        print_page(target, page);
    }
    target.finish();
    return ExitCode::done;
}

} // namespace qlean
