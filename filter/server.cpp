// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Options, learning the shape of the disk, and choosing what serves an export.

#include "filter/server.h"

#include <stdexcept>

#include <fmt/format.h>

#include "filter/disk_export.h"
#include "filter/reclaim_export.h"
#include "filter/status.h"
#include "filter/status_export.h"

namespace qlean {

namespace {

constexpr std::uint32_t usual_cluster_size = 65536;

/// A short look at an export before the client's own connection to the plugin is opened. Afterwards would be too
/// late: nbdkit allows one open export per connection and plugin, and aborts otherwise.
class Peek {
  public:
    Peek(nbdkit_backend *backend, const char *name) : next_(nbdkit_next_context_open(backend, 1, name, 0)) {
        ready_ = next_ && next_->prepare(next_) == 0;
    }
    ~Peek() {
        if (!next_)
            return;
        if (ready_)
            next_->finalize(next_);
        nbdkit_next_context_close(next_);
    }
    Peek(const Peek &) = delete;
    Peek &operator=(const Peek &) = delete;

    std::int64_t size() { return ready_ ? next_->get_size(next_) : -1; }

    std::uint32_t preferred_block_size() {
        std::uint32_t minimum = 0, preferred = 0, maximum = 0;
        return ready_ && next_->block_size(next_, &minimum, &preferred, &maximum) == 0 ? preferred : 0;
    }

    std::optional<std::string> read(std::size_t length) {
        std::string text(length, '\0');
        int err = 0;
        if (!ready_ || next_->pread(next_, text.data(), static_cast<std::uint32_t>(length), 0, 0, &err) == -1)
            return std::nullopt;
        return text;
    }

  private:
    nbdkit_next *next_;
    bool ready_;
};

std::uint64_t parse_size(const std::string &key, const char *value) {
    const std::int64_t size = nbdkit_parse_size(value);
    if (size < 0)
        throw std::runtime_error(fmt::format("{}={} is not a size; write it like 64M", key, value));
    return static_cast<std::uint64_t>(size);
}

} // namespace

bool Server::config(const std::string &key, const char *value) {
    if (key == "reclaim-cluster") {
        const std::uint64_t size = parse_size(key, value);
        if (!Geometry::valid_cluster_size(size))
            throw std::runtime_error(
                fmt::format("reclaim-cluster={} is not usable; give a power of two from 512 to 32M", value));
        cluster_size_ = static_cast<std::uint32_t>(size);
        return true;
    }
    if (key == "reclaim-memory") {
        const std::uint64_t size = parse_size(key, value);
        if (size < Record::smallest_memory)
            throw std::runtime_error(fmt::format("reclaim-memory={} is too little; give at least 64K", value));
        memory_ = size;
        return true;
    }
    if (key == "maintenance")
        maintainers_ = plugin::Maintainers(value); // the plugin's parameter, so it goes on to the plugin
    return false;
}

void Server::set_default_name(const std::string &name) {
    const Lock guard(mutex_);
    default_name_ = name;
}

bool Server::is_default(const std::string &name) {
    const Lock guard(mutex_);
    return name.empty() || name == default_name_;
}

std::uint32_t Server::learn_cluster_size(nbdkit_backend *backend, std::uint32_t preferred) const {
    if (cluster_size_ != 0)
        return cluster_size_;
    // Below one granule there would be no pieces to add up, and no plugin means so small a block as what it frees.
    if (Geometry::valid_cluster_size(preferred) && preferred > Geometry::largest_granule)
        return preferred;
    // Asked second: a status page may cost the plugin a walk of its tables.
    Peek status(backend, StatusExport::name);
    if (status.size() == static_cast<std::int64_t>(status_page_size)) {
        const auto page = status.read(status_page_size);
        const auto size = page ? cluster_size_in(*page) : std::nullopt;
        if (size && Geometry::valid_cluster_size(*size))
            return static_cast<std::uint32_t>(*size);
    }
    return usual_cluster_size;
}

/// The watcher, made at the first call at which the disk can be opened. Null if it can't be.
Watcher *Server::watcher(nbdkit_context *context) {
    const Lock guard(mutex_);
    if (watcher_ || unwatched_writer_)
        return watcher_.get();
    nbdkit_backend *backend = nbdkit_context_get_backend(context);
    std::int64_t size = -1;
    std::uint32_t preferred = 0;
    {
        Peek disk(backend, "");
        size = disk.size();
        preferred = size >= 0 ? disk.preferred_block_size() : 0;
    }
    if (size < 0) {
        // Whoever is served now isn't held by the lock; from here on nothing may be recorded.
        unwatched_writer_ = true;
        nbdkit_error("the default export can't be opened: nothing will be reclaimed until the server is restarted");
        return nullptr;
    }
    const std::uint32_t cluster_size = learn_cluster_size(backend, preferred);
    nbdkit_debug("reclaim: watching a disk of %lld bytes in clusters of %u", static_cast<long long>(size),
                 cluster_size);
    watcher_ = std::make_unique<Watcher>(static_cast<std::uint64_t>(size), cluster_size, memory_);
    return watcher_.get();
}

/// The disk, as 'reclaim' uses it: our plugin does not count what comes by that name as the guest's requests. Most
/// others have one disk whatever it is called; one that refuses says so in the log, and one of another size is not the
/// disk.
const char *Server::disk_below(nbdkit_context *context) {
    const auto size_of = [context](const char *name) { return Peek(nbdkit_context_get_backend(context), name).size(); };
    const std::int64_t size = size_of(plugin::reclaim_disk);
    return size >= 0 && size == size_of("") ? plugin::reclaim_disk : "";
}

std::unique_ptr<Export> Server::open(nbdkit_next_open *next, nbdkit_context *context, int readonly,
                                     const std::string &name) {
    if (name == plugin::reclaim_disk)
        throw std::runtime_error(fmt::format("there is no export '{}'", name));
    Watcher *const watched = watcher(context);
    std::unique_ptr<Export> opened;
    const bool reclaim = name == ReclaimExport::name;
    if (reclaim) {
        if (!watched)
            throw std::runtime_error("export 'reclaim' is not available: the disk could not be opened");
        maintainers_.require_peer(name);
        opened = std::make_unique<ReclaimExport>(*watched, readonly != 0);
    } else if (is_default(name)) {
        opened = std::make_unique<DiskExport>(watched);
    } else if (name == StatusExport::name) {
        opened = std::make_unique<StatusExport>(watched);
    } else {
        opened = std::make_unique<OtherExport>(watched);
    }
    if (next(context, readonly, reclaim ? disk_below(context) : name.c_str()) == -1)
        return nullptr;
    return opened;
}

} // namespace qlean
