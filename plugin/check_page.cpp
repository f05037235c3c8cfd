// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "check_page.h"

#include "lib/check/check.h"
#include "lib/header_home.h"
#include "lib/image_lock.h"
#include "nbdkit.h"
#include "page_export.h"

#include <nlohmann/json.hpp>

namespace qlean::plugin {

namespace {

using json = nlohmann::ordered_json;

std::string page_of(const CheckReport &report, const std::string &file) {
    json page;
    page["qlean"] = 1;
    page["file"] = file;
    page["image_end_offset"] = report.image_end_offset;
    page["total_clusters"] = report.total_clusters;
    page["allocated_clusters"] = report.allocated_clusters;
    page["fragmented_clusters"] = report.fragmented_clusters;
    page["compressed_clusters"] = report.compressed_clusters;
    page["leaks"] = report.leaks;
    page["corruptions"] = report.corruptions;
    page["check_errors"] = report.check_errors;
    page["leaks_fixed"] = report.leaks_fixed;
    page["corruptions_fixed"] = report.corruptions_fixed;
    page["problems"] = report.problems;
    std::string text = page.dump(1, ' ', false, json::error_handler_t::replace);
    if (text.size() >= page_size) { // file names may be long
        page["problems"] = json::array();
        text = page.dump(1, ' ', false, json::error_handler_t::replace);
    }
    return padded(std::move(text));
}

class CheckExport final : public PageExport {
  public:
    CheckExport(Server &server, bool read_only, std::uint64_t connection)
        : server_(server), read_only_(read_only), connection_(connection) {}
    ~CheckExport() override { server_.ownership.release(connection_); }

    Abilities abilities() const override { return {false, !read_only_, false, false}; }
    std::string description() const override {
        return "the verdict on the image, as JSON; reading it checks, CACHE repairs leaks, FLUSH commits";
    }

    void cache(std::uint64_t, std::uint64_t) override {
        if (read_only_)
            throw Error(Error::Kind::denied, EPERM, "nothing is repaired: the server is read-only");
        remake([&] { return check(Repair::leaks); });
    }
    void flush() override {
        if (server_.image && !read_only_)
            server_.image->give_back();
    }

  private:
    std::string make() override { return check(Repair::none); }

    std::string check(Repair how) {
        const StopCheck stop = [this] { return server_.gate.closing() || nbdkit_nanosleep(0, 0) == -1; };
        CheckReport report;
        if (!server_.image) {
            // After a repair the verdict is there, and nobody else changes the file.
            report = server_.repaired ? *server_.repaired : check_file(*server_.checked, stop);
        } else {
            // Homes of metadata must not change under the walk.
            server_.ownership.claim("check", connection_);
            try {
                report = check_image(server_.image->state(), how, stop);
            } catch (...) {
                server_.ownership.release(connection_);
                throw;
            }
            server_.ownership.release(connection_);
            leaks_fixed_ += report.leaks_fixed;
            report.leaks_fixed = leaks_fixed_;
        }
        return page_of(report, server_.options.file);
    }

    Server &server_;
    const bool read_only_;
    const std::uint64_t connection_;
    std::uint64_t leaks_fixed_ = 0;
};

} // namespace

std::unique_ptr<Export> open_check_export(Server &server, bool read_only, std::uint64_t connection) {
    return std::make_unique<CheckExport>(server, read_only, connection);
}

void prepare_check_only(Server &server) {
    const bool writes = server.options.repair.value_or(Repair::none) != Repair::none;
    const auto access = writes ? PosixFile::Access::read_write : PosixFile::Access::read_only;
    server.checked = PosixFile::open(server.options.file, access);
    lock_image(*server.checked, access);
    if (writes) {
        server.checked->agree_with_device();
        server.repaired = repair_file(*server.checked, *server.options.repair);
    } else
        read_header(*server.checked).first.require_known(server.options.file);
}

} // namespace qlean::plugin
