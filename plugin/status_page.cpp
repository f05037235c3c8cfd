// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "status_page.h"

#include "guard.h"
#include "lib/compact/compact.h"
#include "lib/posix_file.h"
#include "lib/thread_safety.h"
#include "nbdkit.h"
#include "page_export.h"

#include <nlohmann/json.hpp>
#include <unistd.h>

namespace qlean::plugin {

namespace {

using json = nlohmann::ordered_json;

/// The last walk of the image, and what it cost.
struct Measured {
    Mutex walking; ///< held over a walk, and outside the other
    Mutex mutex;
    std::optional<Survey> survey PROTECTED_BY(mutex);
    std::chrono::steady_clock::time_point at PROTECTED_BY(mutex){};
    std::chrono::steady_clock::duration took PROTECTED_BY(mutex){};
};

Measured &measured() {
    static Measured instance;
    return instance;
}

/// Walking costs the guest something: at most a tenth of the time goes into it, however often a status is opened.
constexpr int rest_factor = 10;

json known(std::int64_t value) { return value < 0 ? json(nullptr) : json(value); }

json traffic(const GuestStats::Totals &totals, GuestStats::Kind kind) {
    return {{"requests", totals.requests[kind]}, {"bytes", totals.bytes[kind]}};
}

} // namespace

void measure_status(Server &server) {
    Measured &m = measured();
    const auto recent = [&m](std::chrono::steady_clock::time_point now) {
        const Lock guard(m.mutex);
        return m.survey && now - m.at < m.took * rest_factor;
    };
    // Whoever finds another at it waits: an opened page is to be true, a page that is open already is not held up.
    const Lock walking(m.walking);
    const auto began = std::chrono::steady_clock::now();
    if (recent(began))
        return;
    try {
        const Survey survey = survey_image(server.image->state(), [&] { return server.gate.closing(); });
        const Lock guard(m.mutex);
        m.survey = survey;
        m.at = std::chrono::steady_clock::now();
        m.took = m.at - began;
    } catch (const Error &error) {
        if (error.kind() != Error::Kind::stopped)
            throw;
        // Somebody wants to be alone: the page has to do with what is known.
    }
}

std::string make_status_page(Server &server) {
    State &state = server.image->state();
    const Geometry &g = state.geometry;
    const auto counts = state.allocator.counts();
    const auto totals = server.stats.totals();
    const auto recent = server.stats.recent();

    json page;
    page["qlean"] = 1;
    page["version"] = QLEAN_VERSION;
    page["server"] = {{"pid", ::getpid()}, {"nbdkit", server.nbdkit_version}, {"read_only", state.read_only}};
    page["image"] = {{"file", state.file.name()},
                     {"qcow2_version", state.header.header().version},
                     {"virtual_size", g.virtual_size()},
                     {"cluster_size", g.cluster_size()},
                     {"encryption", state.encryption_header.count > 0 ? json("luks") : json(nullptr)}};
    if (const Backing *below = state.contents.below())
        page["image"]["backing"] = {{"file", below->name()}, {"size", below->size()}, {"depth", below->depth()}};
    page["file"] = {{"length", state.file.length()}, {"allocated", state.file.allocated()}};
    if (state.mapper.format().external_data)
        page["data_file"] = {{"file", state.data.name()},
                             {"raw", state.raw_data},
                             {"length", state.data.length()},
                             {"allocated", state.data.allocated()}};
    {
        Measured &m = measured();
        const Lock guard(m.mutex);
        if (m.survey) {
            const auto pinned = server.gauges.pinned.load();
            const std::uint64_t data = m.survey->data + m.survey->packs;
            page["clusters"] = {
                {"in_use", data + m.survey->metadata + static_cast<std::uint64_t>(std::max<std::int64_t>(pinned, 0))},
                {"data", data},
                {"metadata", m.survey->metadata},
                {"pinned", known(pinned)},
                {"retired", counts.retired},
                {"free", counts.complete ? json(counts.free + counts.punching) : json(nullptr)}};
            page["fragmentation"] = {{"allocated", m.survey->data + m.survey->compressed},
                                     {"fragmented", m.survey->fragmented},
                                     {"compressed", m.survey->compressed}};
        } else {
            page["clusters"] = nullptr;
            page["fragmentation"] = nullptr;
        }
    }
    const bool bounded = [] { // compressed extents are moved as they come, and asking again for them counts them again
        Measured &m = measured();
        const Lock guard(m.mutex);
        return m.survey && m.survey->packs == 0;
    }();
    page["compact"] = {{"ideal_end", known(server.gauges.ideal_end)},
                       {"pending", known(server.gauges.pending)},
                       {"most_by_request", bounded ? json(Compact::most_by_request) : json(nullptr)},
                       {"moved_bytes", server.gauges.moved_bytes.load()},
                       {"given_back_bytes", server.gauges.given_back_bytes.load()}};
    page["compression"] = {{"decompressed", state.compressed.decompressed()},
                           {"kept_bytes", state.compressed.memory_bytes()}};
    page["zeroes"] = {{"read_bytes", server.gauges.zero_read_bytes.load()},
                      {"freed_bytes", server.gauges.zero_freed_bytes.load()}};
    json owner = nullptr;
    if (const auto o = server.ownership.owner())
        owner = {{"export", o->operation}, {"connection", o->connection}};
    page["maintenance"] = {{"owner", owner}};
    page["commit"] = {{"count", state.write_back.commits()}, {"last_ms", state.write_back.last_commit_ms()}};
    page["guest"] = {{"read", traffic(totals, GuestStats::read)},
                     {"write", traffic(totals, GuestStats::write)},
                     {"trim", traffic(totals, GuestStats::trim)},
                     {"zero", traffic(totals, GuestStats::zero)},
                     {"flush", {{"requests", totals.requests[GuestStats::flush]}}}};
    if (recent.count() > 0)
        page["guest"]["latency_us"] = {
            {"p50", recent.quantile_us(0.5)}, {"p99", recent.quantile_us(0.99)}, {"max", recent.quantile_us(1.0)}};
    page["memory"] = {{"metadata_cache", state.l2.memory_bytes()}, {"metadata_dirty", state.l2.dirty_bytes()}};
    page["poisoned"] = state.write_back.poisoned();
    const auto [error, errors] = last_error().get();
    page["errors"] = errors;
    page["last_error"] = error ? json(*error) : json(nullptr);

    std::string text = page.dump(1, ' ', false, json::error_handler_t::replace);
    if (text.size() >= page_size)
        text = R"({"qlean": 1, "last_error": "the status does not fit its page"})";
    return padded(std::move(text));
}

} // namespace qlean::plugin
