// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// What the command line says, one structure for each subcommand. Filled in by main.cpp, read-only afterwards.
#pragma once

#include "failure.h"
#include "private_server.h"

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace qlean {

struct StatusOptions {
    std::string target;
    Nbdkit nbdkit;
    bool json = false;
};

struct PlanOptions {
    std::string target;
    std::string export_name; // empty: all of them
    Nbdkit nbdkit;
    bool map = false;
    bool json = false;
};

struct SnapshotOptions {
    std::string target;
    std::string name; // or id; only to delete
    Nbdkit nbdkit;
    bool json = false;
};

struct CompactOptions {
    std::string target;
    Nbdkit nbdkit;
    std::optional<std::uint64_t> max_rate; // bytes per second
    std::optional<std::chrono::milliseconds> max_time;
    bool zeroes = true;
    bool fast = false; // no consideration for the guest
    bool dry_run = false;
    bool json = false;
    bool quiet = false;
};

struct CheckOptions {
    std::string target;
    Nbdkit nbdkit;
    std::string repair; // empty, "leaks" or "all"
    bool json = false;
};

struct ResizeOptions {
    std::string target;
    Nbdkit nbdkit;
    std::uint64_t bytes = 0;
    bool relative = false; // so much more
};

struct ServeOptions {
    std::string image;
    std::string socket; // empty: IMAGE.sock
    Nbdkit nbdkit;
    std::optional<unsigned> threads;
    bool read_only = false;
    bool filter = true;
    std::vector<std::string> extra;
};

ExitCode run_status(const StatusOptions &options);
ExitCode run_plan(const PlanOptions &options);
ExitCode run_compact(const CompactOptions &options);
ExitCode run_check(const CheckOptions &options);
ExitCode run_snapshot_list(const SnapshotOptions &options);
ExitCode run_snapshot_delete(const SnapshotOptions &options);
ExitCode run_resize(const ResizeOptions &options);
ExitCode run_serve(const ServeOptions &options);

} // namespace qlean
