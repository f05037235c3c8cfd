// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The command line and nothing else: CLI11 fills the option structures, one function runs, exceptions become exit
// codes.
#include "failure.h"
#include "options.h"
#include "units.h"

#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <fcntl.h>
#include <sstream>
#include <system_error>
#include <unistd.h>

namespace {

using namespace qlean;

const char *const target_help = "NBD URI, path of a Unix socket, or image file (served privately for this command)";

void add_image(CLI::App *command, Nbdkit &nbdkit) {
    command
        ->add_option("--passphrase-file", nbdkit.passphrase_file,
                     "The file that holds the passphrase of an encrypted image")
        ->type_name("FILE");
    command
        ->add_option("--data-file", nbdkit.data_file,
                     "The image's external data file, if it is not where the image says")
        ->type_name("FILE");
}

void add_common(CLI::App *command, std::string &target, Nbdkit &nbdkit) {
    command->add_option("TARGET", target, target_help)->required();
    command->add_option("--nbdkit", nbdkit.program, "The nbdkit to start when TARGET is an image file")
        ->type_name("PATH");
    add_image(command, nbdkit);
}

void take_rate(CompactOptions &options, const std::string &text) {
    options.max_rate = parse_size(text);
    if (!options.max_rate) {
        throw CLI::ValidationError("--max-rate",
                                   "'" + text + "' is not a rate; examples: 500K, 20M, 1.5G (bytes per second)");
    }
}

void take_time(CompactOptions &options, const std::string &text) {
    options.max_time = parse_duration(text);
    if (!options.max_time) {
        throw CLI::ValidationError("--max-time", "'" + text + "' is not a duration; examples: 90, 90s, 15m, 2h");
    }
}

void take_size(ResizeOptions &options, const std::string &text) {
    options.relative = text.rfind('+', 0) == 0;
    const auto bytes = parse_size(options.relative ? text.substr(1) : text);
    if (!bytes) {
        throw CLI::ValidationError("SIZE", "'" + text + "' is not a size; examples: 20G, +512M, 21474836480");
    }
    options.bytes = *bytes;
}

// A missing command is what CLI11 complains of also where the command is there, misspelt.
void require_known_word(const CLI::App &app, int argc, char **argv) {
    const auto all = [](const CLI::App *) { return true; };
    const CLI::App *at = &app;
    for (int i = 1; i < argc; ++i) {
        const auto known = at->get_subcommands(all);
        if (known.empty()) {
            return;
        }
        const auto it =
            std::find_if(known.begin(), known.end(), [&](const CLI::App *one) { return one->get_name() == argv[i]; });
        if (it == known.end()) {
            throw Failure(fmt::format("there is no command '{}'; 'qlean --help' lists them", argv[i]), ExitCode::usage);
        }
        at = *it;
    }
}

int run(int argc, char **argv) {
    CLI::App app("qlean keeps QCOW2 images lean while their virtual machines run.", "qlean");
    app.set_version_flag("--version", "qlean " QLEAN_VERSION);
    app.require_subcommand(1);
    ExitCode code = ExitCode::done;

    StatusOptions status;
    auto *status_command = app.add_subcommand("status", "Show size, use and fragmentation of an image");
    add_common(status_command, status.target, status.nbdkit);
    status_command->add_flag("--json", status.json, "Print the server's status page as JSON");
    status_command->final_callback([&] { code = run_status(status); });

    PlanOptions plan;
    auto *plan_command = app.add_subcommand("plan", "Show what the maintenance operations would do; changes nothing");
    add_common(plan_command, plan.target, plan.nbdkit);
    plan_command->add_option("EXPORT", plan.export_name, "Only this operation, e.g. compact");
    plan_command->add_flag("--map", plan.map, "List every range (offset and length in bytes)");
    plan_command->add_flag("--json", plan.json, "Print JSON");
    plan_command->final_callback([&] { code = run_plan(plan); });

    CompactOptions compact;
    auto *compact_command = app.add_subcommand("compact", "Make the image as small as its contents allow");
    add_common(compact_command, compact.target, compact.nbdkit);
    compact_command
        ->add_option_function<std::string>(
            "--max-rate", [&](const std::string &text) { take_rate(compact, text); },
            "At most that many bytes per second; suffixes K, M, G, T")
        ->type_name("RATE");
    compact_command
        ->add_option_function<std::string>(
            "--max-time", [&](const std::string &text) { take_time(compact, text); },
            "Stop after that time and keep what was gained; suffixes s, m, h, d")
        ->type_name("TIME");
    compact_command->add_flag("--fast", compact.fast, "Take all there is, even if the guest has to wait for it");
    compact_command->add_flag_callback(
        "--no-zeroes", [&] { compact.zeroes = false; }, "Do not read data looking for zeroes");
    compact_command->add_flag("-n,--dry-run", compact.dry_run, "Only show what would be done");
    compact_command->add_flag("--json", compact.json, "Print a summary as JSON on stdout");
    compact_command->add_flag("-q,--quiet", compact.quiet, "Show no progress");
    compact_command->final_callback([&] { code = run_compact(compact); });

    CheckOptions check;
    auto *check_command = app.add_subcommand("check", "Check an image for leaks and corruptions, and repair it");
    add_common(check_command, check.target, check.nbdkit);
    check_command->add_option("--repair", check.repair, "leaks: also beside a running guest; all: only an image file")
        ->check(CLI::IsMember({"leaks", "all"}));
    check_command->add_flag("--json", check.json, "Print the verdict as JSON");
    check_command->final_callback([&] { code = run_check(check); });

    SnapshotOptions snapshot;
    auto *snapshot_command = app.add_subcommand("snapshot", "List or delete internal snapshots");
    snapshot_command->require_subcommand(1);
    auto *snapshot_list = snapshot_command->add_subcommand("list", "Show the internal snapshots of an image");
    add_common(snapshot_list, snapshot.target, snapshot.nbdkit);
    snapshot_list->add_flag("--json", snapshot.json, "Print JSON");
    snapshot_list->final_callback([&] { code = run_snapshot_list(snapshot); });
    auto *snapshot_delete = snapshot_command->add_subcommand("delete", "Delete one and give its space back");
    add_common(snapshot_delete, snapshot.target, snapshot.nbdkit);
    snapshot_delete->add_option("NAME", snapshot.name, "Its name, or its id")->required();
    snapshot_delete->final_callback([&] { code = run_snapshot_delete(snapshot); });
    ResizeOptions resize;
    auto *resize_command = app.add_subcommand("resize", "Make the disk of an image larger, while it is in use");
    add_common(resize_command, resize.target, resize.nbdkit);
    resize_command
        ->add_option_function<std::string>(
            "SIZE", [&](const std::string &text) { take_size(resize, text); },
            "The new size of the disk, or +SIZE for so much more; suffixes K, M, G, T")
        ->required()
        ->type_name("SIZE");
    resize_command->final_callback([&] { code = run_resize(resize); });

    ServeOptions serve;
    auto *serve_command = app.add_subcommand("serve", "Serve an image with nbdkit in the foreground");
    serve_command->add_option("IMAGE", serve.image, "The QCOW2 image")->required();
    serve_command->add_option("--socket", serve.socket, "Unix socket to listen on (default: IMAGE.sock)")
        ->type_name("PATH");
    serve_command->add_option("-t,--threads", serve.threads, "Worker threads for each connection")
        ->check(CLI::Range(1, 1024));
    serve_command->add_flag("-r,--read-only", serve.read_only, "Serve read-only");
    serve_command->add_flag_callback(
        "--no-filter", [&] { serve.filter = false; }, "Do not load the reclaim filter");
    serve_command->add_option("--nbdkit", serve.nbdkit.program, "The nbdkit to run")->type_name("PATH");
    add_image(serve_command, serve.nbdkit);
    serve_command->add_option("NBDKIT-ARGS", serve.extra, "After --: more arguments for nbdkit");
    serve_command->final_callback([&] { code = run_serve(serve); });

    try {
        app.parse(argc, argv);
    } catch (const CLI::ParseError &e) {
        if (e.get_exit_code() == static_cast<int>(CLI::ExitCodes::RequiredError)) {
            require_known_word(app, argc, argv);
        }
        // The 2 of `check` means corruptions.
        const ExitCode usage = app.got_subcommand(check_command) ? ExitCode::error : ExitCode::usage;
        std::ostringstream help; // and version
        if (app.exit(e, help) != 0) {
            return static_cast<int>(usage);
        }
        fmt::print("{}", help.str());
        code = ExitCode::done;
    }
    flush_output();
    return static_cast<int>(code);
}

// A descriptor opened later must not become the standard output, with the text of it in a connection. What is opened
// here instead of a closed one fails to read, or to write.
void fill_standard_descriptors() {
    for (const int fd : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) {
        if (::fcntl(fd, F_GETFD) == -1 && ::open("/dev/null", fd == STDIN_FILENO ? O_WRONLY : O_RDONLY) == -1) {
            std::abort();
        }
    }
}

} // namespace

int main(int argc, char **argv) {
    fill_standard_descriptors();
    try {
        return run(argc, argv);
    } catch (const qlean::Failure &e) {
        qlean::tell(std::string("qlean: ") + e.what());
        return static_cast<int>(e.code());
    } catch (const std::system_error &e) {
        // fmt's, if it could not print: more was printed than is buffered.
        qlean::tell(std::ferror(stdout) != 0
                        ? std::string("qlean: cannot write to standard output: ") + std::strerror(e.code().value())
                        : std::string("qlean: unexpected error: ") + e.what());
        return static_cast<int>(qlean::ExitCode::error);
    } catch (const std::exception &e) {
        qlean::tell(std::string("qlean: unexpected error: ") + e.what());
        return static_cast<int>(qlean::ExitCode::error);
    }
}
