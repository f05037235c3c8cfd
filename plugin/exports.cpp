// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "exports.h"

#include "check_page.h"
#include "lib/compact/compact.h"
#include "lib/compact/snapshot_delete.h"
#include "lib/compact/zero_scan.h"
#include "lib/error.h"
#include "nbdkit.h"
#include "page_export.h"
#include "resize_export.h"
#include "snapshot_exports.h"
#include "status_page.h"

namespace qlean::plugin {

namespace {

[[noreturn]] void refuse(const std::string &text) { throw Error(Error::Kind::denied, EPERM, text); }

class DiskExport final : public Export {
  public:
    DiskExport(Server &server, GuestStats &stats, bool read_only)
        : image_(*server.image), size_(image_.size()), stats_(stats), read_only_(read_only) {}

    std::uint64_t size() const override { return size_; }
    bool survives_resize() const override { return true; }
    Abilities abilities() const override { return {!read_only_, true, true, true}; }
    std::string description() const override { return "the guest's disk"; }

    void read(std::span<std::byte> into, std::uint64_t at) override {
        const GuestStats::Timer timer(stats_, GuestStats::read, into.size());
        image_.read(into, {at});
    }
    void write(std::span<const std::byte> from, std::uint64_t at) override {
        const GuestStats::Timer timer(stats_, GuestStats::write, from.size());
        image_.write(from, {at});
    }
    void flush() override {
        const GuestStats::Timer timer(stats_, GuestStats::flush, 0);
        image_.flush();
    }
    void trim(std::uint64_t at, std::uint64_t length) override {
        const GuestStats::Timer timer(stats_, GuestStats::trim, length);
        image_.trim({at}, length);
    }
    void zero(std::uint64_t at, std::uint64_t length, bool may_trim, bool fast) override {
        const GuestStats::Timer timer(stats_, GuestStats::zero, length);
        image_.zero({at}, length, may_trim ? Image::Zero::may_trim : Image::Zero::keep_space, fast);
    }
    void extents(std::uint64_t at, std::uint64_t length, std::size_t most, const AddExtent &add) override {
        for (const auto &e : image_.extents({at}, length, most))
            if (!add(e.at.value, e.length, !e.allocated, e.zero))
                return;
    }
    void cache(std::uint64_t at, std::uint64_t length) override { image_.prefetch({at}, length); }

  private:
    Image &image_;
    const std::uint64_t size_; // of a connection, for as long as it lasts
    GuestStats &stats_;
    bool read_only_;
};

class MaintenanceExport final : public Export {
  public:
    MaintenanceExport(Server &server, std::string name, std::unique_ptr<Maintenance> operation, bool read_only)
        : server_(server), size_(server.image->size()), name_(std::move(name)), operation_(std::move(operation)),
          read_only_(read_only) {}

    std::uint64_t size() const override { return size_; }
    Abilities abilities() const override { return {false, !read_only_, true, false}; }
    std::string description() const override {
        return fmt::format("maintenance: block status is the plan, CACHE does it, FLUSH commits ({})", name_);
    }

    void read(std::span<std::byte>, std::uint64_t) override {
        // Whoever reads took this for a disk; a filter that does may send CACHE of its own accord.
        was_read_.store(true, std::memory_order_relaxed);
        refuse(fmt::format("export '{}' is a maintenance operation, not a disk; it cannot be read", name_));
    }
    void flush() override {
        if (!read_only_)
            operation_->commit(stop());
    }
    void extents(std::uint64_t at, std::uint64_t length, std::size_t most, const AddExtent &add) override {
        // Never "zero": a backup of this export would succeed as an empty disk.
        for (const auto &p : operation_->plan({at}, length, most, stop()))
            if (!add(p.at.value, p.length, !p.to_do, false))
                return;
    }
    void cache(std::uint64_t at, std::uint64_t length) override {
        if (read_only_)
            refuse(fmt::format("export '{}' cannot do anything: the server is read-only", name_));
        if (was_read_.load(std::memory_order_relaxed))
            refuse(fmt::format("export '{}' was read over this connection, so it does nothing more on it; reconnect",
                               name_));
        operation_->run({at}, length, stop());
    }

  private:
    StopCheck stop() const {
        return [this] { return server_.gate.closing() || nbdkit_nanosleep(0, 0) == -1; };
    }

    Server &server_;
    const std::uint64_t size_;
    std::string name_;
    std::unique_ptr<Maintenance> operation_;
    bool read_only_;
    std::atomic<bool> was_read_{false};
};

class StatusExport final : public PageExport {
  public:
    explicit StatusExport(Server &server) : server_(server) { measure_status(server_); }

    std::string description() const override { return "the state of the server and the image, as JSON"; }

  private:
    std::string make() override { return make_status_page(server_); }

    Server &server_;
};

} // namespace

void Export::write(std::span<const std::byte>, std::uint64_t) { refuse("this export cannot be written"); }
void Export::trim(std::uint64_t, std::uint64_t) { refuse("this export cannot be trimmed"); }
void Export::zero(std::uint64_t, std::uint64_t, bool, bool) { refuse("this export cannot be zeroed"); }
void Export::extents(std::uint64_t at, std::uint64_t length, std::size_t, const AddExtent &add) {
    add(at, length, false, false);
}
void Export::cache(std::uint64_t, std::uint64_t) {}

std::vector<std::string> export_names(Server &server) {
    if (server.checked)
        return {"check"};
    if (!server.options.maintainers.include_peer())
        return {"", "status"};
    std::vector<std::string> names = {"", "compact", "zeroes", "status", "check", "snapshots"};
    const auto snapshots = snapshot_export_names(server);
    names.insert(names.end(), snapshots.begin(), snapshots.end());
    return names;
}

static std::unique_ptr<Export> open_by_name(Server &server, const std::string &name, bool read_only) {
    const std::uint64_t connection = ++server.connections;
    if (server.checked) {
        if (name.empty() || name == "check")
            return open_check_export(server, true, connection);
        throw Error(Error::Kind::unsupported, ENOENT,
                    fmt::format("there is no export '{}': this server only checks; its export is 'check'", name));
    }
    read_only = read_only || server.image->read_only();
    if (name.empty())
        return std::make_unique<DiskExport>(server, server.stats, read_only);
    if (name == "status")
        return std::make_unique<StatusExport>(server);
    server.options.maintainers.require_peer(name);
    if (name == reclaim_disk)
        return std::make_unique<DiskExport>(server, server.reclaim_stats, read_only);
    if (name == "check")
        return open_check_export(server, read_only, connection);
    if (name == "compact")
        return std::make_unique<MaintenanceExport>(
            server, name, std::make_unique<Compact>(*server.image, server.ownership, server.gauges, connection),
            read_only);
    if (name == "zeroes")
        return std::make_unique<MaintenanceExport>(server, name,
                                                   std::make_unique<ZeroScan>(*server.image, server.gauges), read_only);
    if (name.starts_with(resize_prefix))
        return open_resize(server, name, read_only, connection);
    if (name == "snapshots")
        return open_snapshots_page(server);
    if (const std::string prefix = "snapshot/"; name.rfind(prefix, 0) == 0)
        return open_snapshot_export(server, name.substr(prefix.size()));
    if (const std::string prefix = "snapshot-delete/"; name.rfind(prefix, 0) == 0)
        return std::make_unique<MaintenanceExport>(
            server, name,
            std::make_unique<SnapshotDelete>(*server.image, server.ownership, connection, name.substr(prefix.size())),
            read_only);
    throw Error(Error::Kind::unsupported, ENOENT,
                fmt::format("there is no export '{}'; the exports are '' (the disk), 'compact', 'zeroes', 'status', "
                            "'check' and 'snapshots'",
                            name));
}

std::unique_ptr<Export> open_export(Server &server, const std::string &name, bool read_only) {
    auto opened = open_by_name(server, name, read_only);
    opened->resizes_before = server.resizes;
    return opened;
}

} // namespace qlean::plugin
