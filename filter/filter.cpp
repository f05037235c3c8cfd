// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// nbdkit's table for the filter `reclaim`: each callback hands over to the export object that is the connection's
// handle. Nothing is decided here.

#define NBDKIT_API_VERSION 2

#include <cerrno>
#include <cstring>
#include <memory>

#include <nbdkit-filter.h>

#include "filter/guard.h"
#include "filter/reclaim_export.h"
#include "filter/server.h"

namespace qlean {
namespace {

std::unique_ptr<Server> server;

Export &self(void *handle) { return *static_cast<Export *>(handle); }

void load() { server = std::make_unique<Server>(); }

void unload() { server.reset(); }

int config(nbdkit_next_config *next, nbdkit_backend *below, const char *key, const char *value) {
    return guard(-1, nullptr, [&] { return server->config(key, value) ? 0 : next(below, key, value); });
}

int list_exports(nbdkit_next_list_exports *next, nbdkit_backend *below, int readonly, int, nbdkit_exports *exports) {
    if (next(below, readonly, exports) == -1)
        return -1;
    if (!server->offers_reclaim())
        return 0;
    for (std::size_t i = 0; i < nbdkit_exports_count(exports); i++)
        if (std::strcmp(nbdkit_get_export(exports, i).name, ReclaimExport::name) == 0)
            return 0; // the plugin has one of that name too: ours is the one that is opened
    return nbdkit_add_export(exports, ReclaimExport::name, nullptr);
}

const char *default_export(nbdkit_next_default_export *next, nbdkit_backend *below, int readonly, int) {
    const char *name = next(below, readonly);
    return guard<const char *>(nullptr, nullptr, [&] {
        if (name)
            server->set_default_name(name);
        return name;
    });
}

void *open(nbdkit_next_open *next, nbdkit_context *context, int readonly, const char *name, int) {
    return guard<void *>(nullptr, nullptr,
                         [&]() -> void * { return server->open(next, context, readonly, name).release(); });
}

void close(void *handle) { delete static_cast<Export *>(handle); }

int prepare(nbdkit_next *next, void *handle, int) {
    return guard(-1, nullptr, [&] { return self(handle).prepare(next); });
}

int block_size(nbdkit_next *next, void *handle, std::uint32_t *minimum, std::uint32_t *preferred,
               std::uint32_t *maximum) {
    return self(handle).block_size(next, minimum, preferred, maximum);
}

int pread(nbdkit_next *next, void *handle, void *buffer, std::uint32_t count, std::uint64_t offset, std::uint32_t flags,
          int *err) {
    return guard(-1, err, [&] { return self(handle).pread(next, buffer, count, offset, flags, err); });
}

int pwrite(nbdkit_next *next, void *handle, const void *buffer, std::uint32_t count, std::uint64_t offset,
           std::uint32_t flags, int *err) {
    return guard(-1, err, [&] { return self(handle).pwrite(next, buffer, count, offset, flags, err); });
}

int flush(nbdkit_next *next, void *handle, std::uint32_t flags, int *err) {
    return guard(-1, err, [&] { return self(handle).flush(next, flags, err); });
}

int trim(nbdkit_next *next, void *handle, std::uint32_t count, std::uint64_t offset, std::uint32_t flags, int *err) {
    return guard(-1, err, [&] { return self(handle).trim(next, count, offset, flags, err); });
}

int zero(nbdkit_next *next, void *handle, std::uint32_t count, std::uint64_t offset, std::uint32_t flags, int *err) {
    return guard(-1, err, [&] { return self(handle).zero(next, count, offset, flags, err); });
}

int extents(nbdkit_next *next, void *handle, std::uint32_t count, std::uint64_t offset, std::uint32_t flags,
            nbdkit_extents *extents, int *err) {
    return guard(-1, err, [&] { return self(handle).extents(next, count, offset, flags, extents, err); });
}

int cache(nbdkit_next *next, void *handle, std::uint32_t count, std::uint64_t offset, std::uint32_t flags, int *err) {
    return guard(-1, err, [&] { return self(handle).cache(next, count, offset, flags, err); });
}

/// The questions without arguments all look alike.
template <auto Question>
auto ask(nbdkit_next *next, void *handle) {
    return (self(handle).*Question)(next);
}

nbdkit_filter table = [] {
    nbdkit_filter f{};
    f.name = "reclaim";
    f.longname = "qlean reclaim filter";
    f.description = "Remembers what the guest discards and zeroes piece by piece, and frees clusters that add up.";
    f.config_help = "reclaim-cluster=SIZE  Size of the clusters below (default: ask the plugin).\n"
                    "reclaim-memory=SIZE   Memory for what is remembered (default: 64M).";
    f.load = load;
    f.unload = unload;
    f.config = config;
    f.list_exports = list_exports;
    f.default_export = default_export;
    f.open = open;
    f.close = close;
    f.prepare = prepare;
    f.get_size = ask<&Export::get_size>;
    f.export_description = ask<&Export::description>;
    f.block_size = block_size;
    f.can_write = ask<&Export::can_write>;
    f.can_flush = ask<&Export::can_flush>;
    f.is_rotational = ask<&Export::is_rotational>;
    f.can_trim = ask<&Export::can_trim>;
    f.can_zero = ask<&Export::can_zero>;
    f.can_fast_zero = ask<&Export::can_fast_zero>;
    f.can_extents = ask<&Export::can_extents>;
    f.can_fua = ask<&Export::can_fua>;
    f.can_multi_conn = ask<&Export::can_multi_conn>;
    f.can_cache = ask<&Export::can_cache>;
    f.pread = pread;
    f.pwrite = pwrite;
    f.flush = flush;
    f.trim = trim;
    f.zero = zero;
    f.extents = extents;
    f.cache = cache;
    return f;
}();

} // namespace
} // namespace qlean

NBDKIT_REGISTER_FILTER(qlean::table)
