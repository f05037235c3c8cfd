// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// `qlean plan`: what each maintenance operation would do now. Reads block status only.
#include "connection.h"
#include "exports.h"
#include "failure.h"
#include "options.h"
#include "plan.h"
#include "signals.h"
#include "target.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <utility>

namespace qlean {

namespace {

struct Totals {
    std::uint64_t bytes = 0;
    std::uint64_t ranges = 0;
};

Totals read_totals(const Target &target, const std::string &name, const std::function<void(Range)> &each) {
    Connection connection(target, name);
    Totals totals;
    const auto take = [&](Range range) {
        totals.bytes += range.length;
        totals.ranges += 1;
        each(range);
    };
    if (!read_ranges(connection, take, [] { return !signals::stop_requested(); })) {
        throw Failure("stopped before the plan was complete", ExitCode::stopped);
    }
    return totals;
}

void print_tables(const Target &target, const std::vector<std::string> &names, bool map) {
    PlanTable table;
    for (const auto &name : names) {
        std::vector<Range> ranges;
        const Totals totals = read_totals(target, name, [&](Range range) {
            if (map) {
                ranges.push_back(range);
            }
        });
        table.add(name, totals.bytes, totals.ranges, ranges);
    }
}

void print_json(const Target &target, const std::vector<std::string> &names, bool map) {
    nlohmann::ordered_json exports = nlohmann::ordered_json::array();
    for (const auto &name : names) {
        nlohmann::ordered_json ranges = nlohmann::ordered_json::array();
        const Totals totals = read_totals(target, name, [&](Range range) {
            if (map) {
                ranges.push_back({{"offset", range.offset}, {"length", range.length}});
            }
        });
        nlohmann::ordered_json entry = {{"name", name}, {"bytes", totals.bytes}, {"ranges", totals.ranges}};
        if (map) {
            entry["map"] = std::move(ranges);
        }
        exports.push_back(std::move(entry));
    }
    const nlohmann::ordered_json document = {{"exports", exports}};
    fmt::print("{}\n", document.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace));
}

} // namespace

ExitCode run_plan(const PlanOptions &options) {
    signals::install();
    if (!options.export_name.empty()) {
        require_operation(options.export_name);
    }
    Target target(options.target, Access::read_only, options.nbdkit);
    if (!target.is_private()) {
        signals::not_begun();
    }
    const std::vector<std::string> names =
        options.export_name.empty() ? maintenance_exports(target) : std::vector{options.export_name};
    if (options.json) {
        print_json(target, names, options.map);
    } else {
        print_tables(target, names, options.map);
    }
    target.finish();
    return ExitCode::done;
}

} // namespace qlean
