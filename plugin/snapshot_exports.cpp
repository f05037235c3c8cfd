// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "snapshot_exports.h"

#include "lib/error.h"
#include "lib/snapshot_disk.h"
#include "page_export.h"

#include <nlohmann/json.hpp>
#include <set>

namespace qlean::plugin {

namespace {

using json = nlohmann::ordered_json;

/// What NBD allows for an export's name.
constexpr std::size_t max_name = 4096 - 32;

class SnapshotExport final : public Export {
  public:
    SnapshotExport(State &state, Snapshots::Use use) : disk_(state, std::move(use)) {}

    std::uint64_t size() const override { return disk_.size(); }
    Abilities abilities() const override { return {false, true, true, true}; }
    std::string description() const override {
        return fmt::format("the disk as it was in snapshot '{}' (id {})", disk_.entry().name, disk_.entry().id);
    }
    bool survives_resize() const override { return true; }

    void read(std::span<std::byte> into, std::uint64_t at) override { disk_.read(into, {at}); }
    void flush() override {}
    void extents(std::uint64_t at, std::uint64_t length, std::size_t most, const AddExtent &add) override {
        for (const auto &e : disk_.extents({at}, length, most))
            if (!add(e.at.value, e.length, !e.allocated, e.zero))
                return;
    }
    void cache(std::uint64_t at, std::uint64_t length) override { disk_.prefetch({at}, length); }

  private:
    SnapshotDisk disk_;
};

std::string make_page(Server &server) {
    const auto snapshots = server.image->state().snapshots.list();
    json page;
    page["qlean"] = 1;
    page["snapshots"] = json::array();
    std::size_t length = 64;
    std::size_t left_off = 0;
    for (const auto &snapshot : snapshots) {
        const SnapshotEntry &e = snapshot->entry();
        const json one = {{"id", e.id},
                          {"name", e.name},
                          {"date", e.date_sec},
                          {"date_nsec", e.date_nsec},
                          {"vm_clock_nsec", e.vm_clock_nsec},
                          {"vm_state_size", e.vm_state_size()},
                          {"disk_size", snapshot->disk_size()}};
        const std::size_t n = one.dump(-1, ' ', false, json::error_handler_t::replace).size() + 1;
        if (left_off != 0 || length + n >= page_size) {
            ++left_off;
            continue;
        }
        length += n;
        page["snapshots"].push_back(one);
    }
    if (left_off != 0)
        page["left_off"] = left_off;
    return padded(page.dump(-1, ' ', false, json::error_handler_t::replace));
}

class SnapshotsPage final : public PageExport {
  public:
    explicit SnapshotsPage(Server &server) : server_(server) {}

    std::string description() const override { return "the internal snapshots of the image, as JSON"; }

  private:
    std::string make() override { return make_page(server_); }

    Server &server_;
};

} // namespace

std::vector<std::string> snapshot_export_names(Server &server) {
    std::vector<std::string> names;
    std::set<std::string> taken;
    for (const auto &snapshot : server.image->state().snapshots.list()) {
        const SnapshotEntry &e = snapshot->entry();
        const auto usable = [&](const std::string &name) {
            return !name.empty() && name.size() <= max_name && name.find('\0') == std::string::npos &&
                   taken.insert(name).second;
        };
        if (usable(e.name))
            names.push_back("snapshot/" + e.name);
        else if (usable(e.id))
            names.push_back("snapshot/" + e.id);
    }
    return names;
}

std::unique_ptr<Export> open_snapshot_export(Server &server, const std::string &name) {
    State &state = server.image->state();
    auto use = state.snapshots.use(name);
    if (!use)
        throw Error(
            Error::Kind::unsupported, ENOENT,
            fmt::format("there is no export 'snapshot/{0}': '{1}' has no snapshot '{0}', or it is being deleted", name,
                        state.file.name()));
    return std::make_unique<SnapshotExport>(state, std::move(*use));
}

std::unique_ptr<Export> open_snapshots_page(Server &server) { return std::make_unique<SnapshotsPage>(server); }

} // namespace qlean::plugin
