// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// `qlean check`: the server's verdict on the image, in the numbers and with the exit codes of `qemu-img check`. A file
// is checked by a private server that serves nothing else, so that it can be checked whatever is wrong with it.
#include "connection.h"
#include "json_page.h"
#include "options.h"
#include "status_page.h"
#include "target.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <cstdint>

namespace qlean {

namespace {

using json = nlohmann::ordered_json;

std::vector<std::string> parameters(const CheckOptions &options) {
    std::vector<std::string> words = {"check-only=yes"};
    if (!options.repair.empty()) {
        words.push_back("repair=" + options.repair);
    }
    return words;
}

std::uint64_t number(const json &verdict, const char *key) {
    const auto it = verdict.find(key);
    return it != verdict.end() && it->is_number_unsigned() ? it->get<std::uint64_t>() : 0;
}

void wait_for(const Target &target, Connection &connection, Ticket &ticket, const char *what) {
    connection.wait(ticket);
    if (connection.lost()) {
        throw Failure("the server is gone; run the command again");
    }
    if (ticket.error != 0) {
        throw Failure(fmt::format("the server could not {}: {}", what, server_says(target, ticket.error)));
    }
}

void repair_leaks(const Target &target, Connection &connection) {
    if (!connection.can_cache()) {
        throw Failure("the server is read-only and repairs nothing");
    }
    Ticket repair;
    connection.start_cache(0, connection.size(), repair);
    wait_for(target, connection, repair, "repair leaks");
    Ticket flush;
    connection.start_flush(flush);
    wait_for(target, connection, flush, "commit the repair");
}

json read_verdict(const Target &target, Connection &connection) {
    try {
        return read_json_page(connection);
    } catch (const RequestRefused &) {
        const std::string said = target.is_private() ? "" : server_says(target);
        if (said.empty()) {
            throw;
        }
        throw Failure(fmt::format("the server could not check: {}", said));
    }
}

void print(const json &verdict) {
    if (const auto it = verdict.find("problems"); it != verdict.end() && it->is_array()) {
        for (const auto &problem : *it) {
            if (problem.is_string()) {
                fmt::print("{}\n", problem.get<std::string>());
            }
        }
    }
    const std::uint64_t leaks = number(verdict, "leaks"), corruptions = number(verdict, "corruptions");
    const std::uint64_t errors = number(verdict, "check_errors");
    if (number(verdict, "leaks_fixed") + number(verdict, "corruptions_fixed") > 0) {
        fmt::print("repaired: {} leaked clusters, {} corruptions\n", number(verdict, "leaks_fixed"),
                   number(verdict, "corruptions_fixed"));
    }
    if (leaks + corruptions + errors == 0) {
        fmt::print("no errors were found on the image\n");
    }
    if (corruptions > 0) {
        fmt::print("{} corruptions: data may be lost; do not write to this image before it is repaired\n", corruptions);
    }
    if (leaks > 0) {
        fmt::print("{} leaked clusters: they waste space and do no other harm\n", leaks);
    }
    if (errors > 0) {
        fmt::print("{} errors kept the check from being complete\n", errors);
    }
    const auto total = number(verdict, "total_clusters"), allocated = number(verdict, "allocated_clusters");
    if (total > 0) {
        const auto percent = [](std::uint64_t part, std::uint64_t whole) {
            return whole == 0 ? 0.0 : 100.0 * static_cast<double>(part) / static_cast<double>(whole);
        };
        fmt::print("{}/{} = {:.2f}% allocated, {:.2f}% fragmented, {:.2f}% compressed clusters\n", allocated, total,
                   percent(allocated, total), percent(number(verdict, "fragmented_clusters"), allocated),
                   percent(number(verdict, "compressed_clusters"), allocated));
    }
    fmt::print("image end offset: {}\n", number(verdict, "image_end_offset"));
}

ExitCode code_of(const json &verdict) {
    if (number(verdict, "check_errors") > 0) {
        return ExitCode::error;
    }
    if (number(verdict, "corruptions") > 0) {
        return ExitCode::corruptions;
    }
    return number(verdict, "leaks") > 0 ? ExitCode::leaks : ExitCode::done;
}

ExitCode check(const CheckOptions &options) {
    const bool repairs = !options.repair.empty();
    Target target(options.target, repairs ? Access::read_write : Access::read_only, options.nbdkit,
                  parameters(options));
    json verdict;
    {
        Connection connection(target, "check");
        if (repairs && !target.is_private()) {
            if (options.repair != "leaks") {
                throw Failure("a server repairs only leaks beside its guests; stop it, then run 'qlean check --repair "
                              "all' on the image file");
            }
            repair_leaks(target, connection);
        }
        verdict = read_verdict(target, connection);
    }
    target.finish();
    if (options.json) {
        fmt::print("{}\n", verdict.dump(2, ' ', false, json::error_handler_t::replace));
    } else {
        print(verdict);
    }
    return code_of(verdict);
}

} // namespace

ExitCode run_check(const CheckOptions &options) {
    try {
        return check(options);
    } catch (const Failure &failure) {
        // The other codes say something about the image here.
        throw Failure(failure.what(), ExitCode::error);
    }
}

} // namespace qlean
