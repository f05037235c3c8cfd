// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// `qlean compact`: reclaim, zeroes, compact, one after the other, with one rate limit and one time limit for all, and a
// comparison of before and after. Results go to stdout, everything that happens on the way to stderr.
#include "connection.h"
#include "courtesy.h"
#include "exports.h"
#include "operation.h"
#include "options.h"
#include "pace.h"
#include "progress.h"
#include "signals.h"
#include "status_page.h"
#include "target.h"
#include "units.h"

#include <fmt/format.h>

#include <algorithm>
#include <exception>
#include <thread>

namespace qlean {

namespace {

struct Outcome {
    Measures before;
    std::optional<Measures> after; // nothing if the server could not be asked any more
    std::vector<OperationReport> operations;
    double elapsed_seconds = 0;
    std::string stopped; // why we stopped early, or empty
    std::string error;
    ExitCode code = ExitCode::done;
};

std::vector<std::string> operations_to_run(const Target &target, bool zeroes) {
    const std::vector<std::string> offered = maintenance_exports(target);
    std::vector<std::string> names;
    for (const char *name : {"reclaim", "zeroes"}) {
        if ((zeroes || name != std::string_view("zeroes")) &&
            std::find(offered.begin(), offered.end(), name) != offered.end()) {
            names.emplace_back(name);
        }
    }
    names.emplace_back("compact"); // if this one is missing, that is an error to tell
    return names;
}

/// What the guest's requests take while we do nothing. The server counts in seconds: one is waited for, if there is a
/// guest at all.
void learn_baseline(Connection &status, const StopCondition &stop, Courtesy &courtesy) {
    constexpr auto window = std::chrono::milliseconds(1100);
    auto p99 = StatusPage::read(status).guest_p99_us();
    const auto until = StopCondition::Clock::now() + window;
    while (p99 && StopCondition::Clock::now() < until && !stop.reached()) {
        std::this_thread::sleep_for(std::chrono::milliseconds(50));
    }
    courtesy.learn_baseline(p99 ? StatusPage::read(status).guest_p99_us() : std::nullopt);
}

void run_operations(const Target &target, const CompactOptions &options, const StopCondition &stop, Progress &progress,
                    Outcome &outcome) {
    Pace pace(options.max_rate);
    // One connection for reading `pending` and reasons: opening one makes the server count clusters anew.
    Connection status(target, "status");
    Courtesy courtesy;
    Speed speed{options.max_rate, options.fast ? nullptr : &courtesy};
    if (speed.courtesy != nullptr) {
        learn_baseline(status, stop, courtesy);
    }
    const auto names = operations_to_run(target, options.zeroes);
    for (const std::string &name : names) {
        OperationReport &report = outcome.operations.emplace_back();
        report.name = name;
        // `zeroes` begins at the start of the disk each time: on a large one `compact` would never come.
        const StopCondition own = name == names.back() ? stop : stop.half();
        Operation operation(target, status, pace, speed, progress, own, report);
        if (!operation.run()) {
            outcome.stopped = own.reason();
            outcome.code = ExitCode::stopped;
            if (stop.reached()) {
                return;
            }
        }
    }
}

nlohmann::ordered_json to_json(const OperationReport &report) {
    const auto optional = [](const auto &value) {
        return value ? nlohmann::ordered_json(*value) : nlohmann::ordered_json();
    };
    return {{"export", report.name},
            {"planned_bytes", report.planned_bytes},
            {"planned_ranges", report.planned_ranges},
            {"handled_bytes", report.handled_bytes},
            {"passes", report.passes},
            {"flushes", report.flushes},
            {"elapsed_seconds", report.elapsed_seconds},
            {"remaining_bytes", optional(report.remaining_bytes)},
            {"pending_clusters", optional(report.pending)},
            {"note", report.note.empty() ? nlohmann::ordered_json() : nlohmann::ordered_json(report.note)}};
}

void print_json(const Target &target, const Outcome &outcome) {
    const auto text = [](const std::string &value) {
        return value.empty() ? nlohmann::ordered_json() : nlohmann::ordered_json(value);
    };
    nlohmann::ordered_json operations = nlohmann::ordered_json::array();
    for (const auto &report : outcome.operations) {
        operations.push_back(to_json(report));
    }
    const nlohmann::ordered_json summary = {
        {"target", target.name()},
        {"before", to_json(outcome.before)},
        {"after", outcome.after ? to_json(*outcome.after) : nlohmann::ordered_json()},
        {"operations", operations},
        {"elapsed_seconds", outcome.elapsed_seconds},
        {"stopped", text(outcome.stopped)},
        {"error", text(outcome.error)},
        {"exit_code", static_cast<int>(outcome.code)}};
    fmt::print("{}\n", summary.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace));
}

void print_row(const char *label, const std::optional<std::uint64_t> &before,
               const std::optional<std::uint64_t> &after) {
    std::string change;
    if (before && after) {
        const char *sign = *after < *before ? "-" : *after > *before ? "+" : "";
        change = sign + show_bytes(*after < *before ? *before - *after : *after - *before);
    }
    fmt::print("{:<18} {:>16} {:>16} {:>16}\n", label, show_bytes(before), show_bytes(after), change);
}

void print_table(const Outcome &outcome) {
    const auto percent = [](const std::optional<double> &value) {
        return value ? fmt::format("{:.2f} %", *value) : std::string("unknown");
    };
    const Measures &before = outcome.before;
    const Measures after = outcome.after.value_or(Measures{});
    fmt::print("{:<18} {:>16} {:>16} {:>16}\n", "", "before", "after", "change");
    print_row("file length", before.length, after.length);
    print_row("allocated on host", before.allocated, after.allocated);
    print_row("clusters in use", before.in_use_bytes, after.in_use_bytes);
    fmt::print("{:<18} {:>16} {:>16}\n", "fragmentation", percent(before.fragmentation), percent(after.fragmentation));
    for (const auto &report : outcome.operations) {
        if (!report.note.empty()) {
            fmt::print("{}\n", report.note);
        }
    }
    if (outcome.code == ExitCode::stopped) {
        fmt::print("stopped early ({}); what was finished is kept, run the command again for the rest\n",
                   outcome.stopped);
    }
}

ExitCode dry_run(const Target &target, const CompactOptions &options) {
    nlohmann::ordered_json operations = nlohmann::ordered_json::array();
    PlanTable table;
    std::optional<Connection> connection;
    for (const std::string &name : operations_to_run(target, options.zeroes)) {
        connection.emplace(target, name);
        std::uint64_t bytes = 0;
        std::uint64_t ranges = 0;
        const auto count = [&](Range range) {
            bytes += range.length;
            ranges += 1;
        };
        if (!read_ranges(*connection, count, [] { return !signals::stop_requested(); })) {
            throw Failure("stopped before the plan was complete; nothing was changed", ExitCode::stopped);
        }
        operations.push_back({{"export", name}, {"planned_bytes", bytes}, {"planned_ranges", ranges}});
        if (!options.json) {
            table.add(name, bytes, ranges);
        }
    }
    // The last connection is to `compact` and still open: the end it computed for its plan is the one we read.
    const StatusPage page = StatusPage::fetch(target);
    const Measures now = page.measures();
    const auto end = page.ideal_end();
    if (options.json) {
        const nlohmann::ordered_json summary = {
            {"target", target.name()},
            {"dry_run", true},
            {"before", to_json(now)},
            {"estimated_length", end ? nlohmann::ordered_json(*end) : nlohmann::ordered_json()},
            {"operations", operations},
            {"exit_code", 0}};
        fmt::print("{}\n", summary.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace));
    } else {
        fmt::print("file length now {}, after compaction about {}{}; nothing was changed\n", show_bytes(now.length),
                   show_bytes(end), options.zeroes ? ", less if zeroes are found" : "");
    }
    return ExitCode::done;
}

} // namespace

ExitCode run_compact(const CompactOptions &options) {
    signals::install();
    const auto started = StopCondition::Clock::now();
    std::optional<StopCondition::Clock::time_point> deadline;
    if (options.max_time) {
        deadline = started + *options.max_time;
    }
    const StopCondition stop(deadline);
    Target target(options.target, options.dry_run ? Access::read_only : Access::read_write, options.nbdkit);
    if (!target.is_private()) {
        signals::not_begun(options.max_time);
    }
    if (options.dry_run) {
        const ExitCode code = dry_run(target, options);
        target.finish();
        return code;
    }

    Outcome outcome;
    outcome.before = StatusPage::fetch(target).measures();
    signals::begin();
    Progress progress(options.quiet);
    std::exception_ptr failure;
    try {
        run_operations(target, options, stop, progress, outcome);
    } catch (const Failure &e) {
        outcome.error = e.what();
        outcome.code = e.code();
        failure = std::current_exception();
    }
    if (outcome.code != ExitCode::server_gone) {
        try {
            progress.phase("reading the result");
            outcome.after = StatusPage::fetch(target).measures();
        } catch (const Failure &) {
            // The operation's own failure, if any, is the better explanation.
        }
    }
    try {
        target.finish();
    } catch (const Failure &e) {
        if (!failure) {
            outcome.error = e.what();
            outcome.code = e.code();
            failure = std::current_exception();
        }
    }
    progress.clear();
    outcome.elapsed_seconds = std::chrono::duration<double>(StopCondition::Clock::now() - started).count();
    if (options.json) {
        print_json(target, outcome);
    } else if (outcome.after && !outcome.operations.empty()) {
        print_table(outcome);
    }
    if (failure) {
        std::rethrow_exception(failure);
    }
    return outcome.code;
}

} // namespace qlean
