// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "resize_export.h"

#include "lib/error.h"

#include <charconv>

namespace qlean::plugin {

namespace {

class ResizeExport final : public Export {
  public:
    ResizeExport(Server &server, std::uint64_t bytes, bool read_only, std::uint64_t connection)
        : server_(server), bytes_(bytes), before_(server.image->size()), read_only_(read_only),
          connection_(connection) {}

    // A disk of no size has no range that could be asked for.
    std::uint64_t size() const override { return std::max<std::uint64_t>(before_, 512); }
    Abilities abilities() const override { return {false, !read_only_, true, false}; }
    std::string description() const override {
        return fmt::format("maintenance: CACHE makes the disk {} bytes large", bytes_);
    }
    bool survives_resize() const override { return true; }
    bool caches_alone() const override { return true; }

    void read(std::span<std::byte>, std::uint64_t) override {
        was_read_.store(true, std::memory_order_relaxed);
        throw Error(Error::Kind::denied, EPERM,
                    "export 'resize' is a maintenance operation, not a disk; it cannot be read");
    }
    void flush() override {
        if (!read_only_)
            server_.image->flush();
    }
    void extents(std::uint64_t at, std::uint64_t length, std::size_t, const AddExtent &add) override {
        add(at, length, server_.image->size() == bytes_, false);
    }
    void cache(std::uint64_t, std::uint64_t) override {
        if (read_only_)
            throw Error(Error::Kind::denied, EPERM, "the disk cannot be resized: the server is read-only");
        if (was_read_.load(std::memory_order_relaxed))
            throw Error(Error::Kind::denied, EPERM,
                        "export 'resize' was read over this connection, so it does nothing more on it; reconnect");
        server_.ownership.claim("resize", connection_);
        struct Release {
            ResizeExport &resize;
            ~Release() { resize.server_.ownership.release(resize.connection_); }
        } const release{*this};
        {
            const auto entry = server_.gate.enter();
            if (server_.image->size() == bytes_)
                return;
            server_.image->require_resizable(bytes_); // a refusal interrupts nobody
        }
        const auto alone = server_.gate.enter_alone();
        // Raised first: what the operations hold is not to be relied on even if this fails half-way.
        ++server_.resizes;
        server_.image->resize(bytes_);
        server_.gauges.ideal_end = server_.gauges.pending = -1;
    }

  private:
    Server &server_;
    const std::uint64_t bytes_, before_;
    const bool read_only_;
    const std::uint64_t connection_;
    std::atomic<bool> was_read_{false};
};

} // namespace

std::unique_ptr<Export> open_resize(Server &server, const std::string &name, bool read_only, std::uint64_t connection) {
    const std::string_view text = std::string_view(name).substr(resize_prefix.size());
    std::uint64_t bytes = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), bytes);
    if (error != std::errc() || end != text.data() + text.size())
        throw Error(Error::Kind::unsupported, ENOENT,
                    fmt::format("there is no export '{}': after 'resize/' comes the size of the disk in bytes", name));
    return std::make_unique<ResizeExport>(server, bytes, read_only, connection);
}

} // namespace qlean::plugin
