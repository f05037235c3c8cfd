// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// What people and servers say in words: parameters of the plugin, names of exports, users, pages of JSON, plans, sizes.
// The first byte of an input chooses, the rest is what is said. nbdkit and the network are stand-ins (texts_rig.cpp):
// the client's Connection is a server that answers with the input.
#include "client/failure.h"
#include "client/plan.h"
#include "client/status_page.h"
#include "client/units.h"
#include "plugin/exports.h"
#include "tests/fuzz/input.h"
#include "tests/fuzz/memory_bound.h"
#include "tests/fuzz/texts_rig.h"

#include <array>

using namespace qlean;
using namespace qlean::fuzz;

namespace {

constexpr std::uint64_t most_bytes = 64 * 1024 * 1024;

void options(Input &in) {
    plugin::Options all;
    while (!in.empty()) {
        static const std::array keys = {"file",   "data-file",   "passphrase", "metadata-cache",
                                        "repair", "maintenance", "check-only", "unknown"};
        const std::string key = keys[in.below(keys.size())];
        const auto value = in.take(in.byte());
        try {
            all.set(key, std::string(reinterpret_cast<const char *>(value.data()), value.size()).c_str());
        } catch (const std::runtime_error &) { // a user who is not there
        }
        require(all.cache_bytes > 0, "a cache of no size");
    }
    all.complete();
}

void users(Input &in) {
    const std::string text = in.text();
    const plugin::Maintainers all(text);
    require(text != "no" || !all.include_peer(), "'no' lets somebody in");
}

void export_name(Input &in) {
    const std::uint64_t how = in.byte(), within = in.number(2);
    plugin::Server &server = served_image();
    const auto opened = plugin::open_export(server, in.text().c_str(), how % 2 != 0);
    require(!opened->description().empty(), "an export without a description");
    const std::uint64_t size = opened->size();
    if (size == 0)
        return;
    const std::uint64_t at = how & 2 ? size - 1 - within % std::min<std::uint64_t>(size, 1024) : within % size;
    const std::uint64_t length = std::min<std::uint64_t>(size - at, 512);
    std::uint64_t next = at;
    if (opened->abilities().extents)
        opened->extents(next, length, 8, [&](std::uint64_t from, std::uint64_t n, bool, bool) {
            require(from <= next && n > 0, "an extent that is not where it was asked for");
            next = from + n;
            return true;
        });
    std::vector<std::byte> into(length);
    opened->read(into, at);
}

void page(Input &in) {
    served_text() = in.text();
    const auto connection = connect(served_text().size());
    const StatusPage page = StatusPage::read(*connection);
    const std::uint64_t cluster = page.cluster_size();
    require(cluster >= 512 && cluster <= 2 * 1024 * 1024 && (cluster & (cluster - 1)) == 0, "an impossible cluster");
    require(page.depth() == 1 || page.depth() == 15, "an impossible depth");
    to_json(page.measures()).dump();
    page.owner();
    page.guest_p99_us();
    page.last_error();
    page.flag({"poisoned"});
    page.json().dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

/// Whatever the server's extents are, pieces ascend, are short, and have all that is to do.
void plan(Input &in) {
    served_text() = in.text();
    PlanBuilder builder(std::uint64_t{1} << (16 + served_text().size() % 8));
    std::uint64_t to_do = 0, end = 0;
    const auto connection = connect(std::uint64_t{1} << 42);
    read_ranges(
        *connection,
        [&](Range range) {
            require(range.length > 0 && range.offset >= end, "ranges that do not ascend");
            end = range.offset + range.length;
            to_do += range.length;
            if (to_do < std::uint64_t{1} << 34) // of more the pieces are too many to look at
                builder.add(range);
        },
        [] { return true; });
    require(end <= connection->size(), "a range beyond the disk");
    const Plan made = builder.take();
    std::uint64_t planned = 0;
    end = 0;
    for (const Piece &piece : made.pieces) {
        require(piece.offset >= end && piece.planned <= piece.span && piece.planned > 0 && piece.span <= 16 << 20,
                "pieces that overlap, or are too long");
        end = piece.offset + piece.span;
        planned += piece.planned;
    }
    require(planned == made.bytes, "a plan that leaves something out");
}

void sizes(Input &in) {
    const std::string text = in.text();
    if (const auto size = parse_size(text))
        require(*size >= 1 && *size < std::uint64_t{1} << 63 && !show_bytes(*size).empty(), "a size that is none");
    if (const auto duration = parse_duration(text))
        require(duration->count() >= 1 &&
                    !show_duration(std::chrono::duration_cast<std::chrono::seconds>(*duration)).empty(),
                "a duration that is none");
}

constexpr std::array parsers = {options, users, export_name, page, plan, sizes};

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t *data, std::size_t size);
int LLVMFuzzerTestOneInput(const std::uint8_t *data, std::size_t size) {
    Input in(data, size);
    served_image();
    const MemoryBound bound(most_bytes);
    try {
        parsers[in.below(parsers.size())](in);
    } catch (const Error &) {
    } catch (const Failure &) {
    } catch (const std::runtime_error &error) {
        require(std::string_view(error.what()).starts_with("maintenance: "), error.what());
    }
    return 0;
}
