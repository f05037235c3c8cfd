// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// nbdkit's view: the callbacks, each a guarded call into the export that the connection opened. Every request passes
// the gate, so that stopping the server is never an I/O error.
#include "check_page.h"
#include "exports.h"
#include "guard.h"
#include "lib/error.h"
#include "nbdkit.h"
#include "server.h"

#include <sys/stat.h>

#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL

namespace qlean::plugin {

Server &server() {
    // Never destroyed: threads of nbdkit may outlive static destruction when the process ends on a signal.
    static auto *instance = new Server;
    return *instance;
}

namespace {

Export &export_of(void *handle) { return *static_cast<Export *>(handle); }

/// What an operation found out of an image does not hold for one that was resized.
void require_current(const Export &opened) {
    if (opened.resizes_before != server().resizes && !opened.survives_resize())
        throw Error(Error::Kind::denied, EPERM, "the image was resized; reconnect");
}

/// A request: waits at the gate, runs, reports.
template <class F>
int request(void *handle, F &&f) {
    return guarded(-1, [&] {
        const auto entry = server().gate.enter();
        require_current(export_of(handle));
        try {
            f();
        } catch (const Error &error) {
            if (error.kind() == Error::Kind::stopped && server().gate.closing() && !server().gate.stopping())
                throw Error(Error::Kind::denied, EPERM, "the image is being resized; reconnect");
            throw;
        }
        return 0;
    });
}

bool leave() {
    return guarded(false, [] {
        if (server().image)
            server().image->close();
        return !server().image || !server().image->state().write_back.poisoned();
    });
}

int config(const char *key, const char *value) {
    return guarded(-1, [&] {
        server().options.set(key, value);
        return 0;
    });
}

int config_complete() {
    return guarded(-1, [&] {
        server().options.complete();
        return 0;
    });
}

int get_ready() {
    return guarded(-1, [&] {
        Image::Options options;
        options.read_only = server().options.read_only;
        options.cache_bytes = server().options.cache_bytes;
        options.repair = server().options.repair;
        options.data_file = server().options.data_file;
        options.passphrase = std::exchange(server().options.passphrase, nullptr);
        server().nbdkit_version = running_nbdkit_version();
        if (server().options.check_only) {
            prepare_check_only(server());
            return 0;
        }
        server().image = Image::open(server().options.file, options);
        return 0;
    });
}

int after_fork() {
    return guarded(-1, [&] {
        if (server().image) {
            server().image->on_background_error([](const std::exception &error) {
                nbdkit_error("in the background: %s", error.what());
                last_error().set(error.what());
            });
            server().image->start_housekeeping();
        }
        server().gate.own_signals(leave);
        return 0;
    });
}

/// nbdkit ends by itself: one client on stdin, or nbdkit_shutdown.
void cleanup() {
    server().gate.shut(leave);
    server().gate.await_shutdown();
}

int list_exports(int, int, nbdkit_exports *exports) {
    return guarded(-1, [&] {
        const auto entry = server().gate.enter();
        for (const auto &name : export_names(server()))
            if (nbdkit_add_export(exports, name.c_str(), nullptr) == -1)
                return -1;
        return 0;
    });
}

const char *default_export(int, int) { return ""; }

void *open(int read_only) {
    return guarded(static_cast<void *>(nullptr), [&]() -> void * {
        const auto entry = server().gate.enter();
        const char *name = nbdkit_export_name();
        void *handle = open_export(server(), name ? name : "", read_only != 0).release();
        server().gate.connected();
        return handle;
    });
}

void close(void *handle) {
    guarded(0, [&] {
        const auto entry = server().gate.enter();
        delete static_cast<Export *>(handle);
        server().gate.disconnected();
        return 0;
    });
}

int64_t get_size(void *handle) { return static_cast<int64_t>(export_of(handle).size()); }
int can_write(void *handle) { return export_of(handle).abilities().write; }
int can_flush(void *) { return 1; }
int can_trim(void *handle) { return export_of(handle).abilities().write; }
int can_zero(void *handle) { return export_of(handle).abilities().write; }
int can_fast_zero(void *handle) { return export_of(handle).abilities().write; }
int can_fua(void *) { return NBDKIT_FUA_NATIVE; }
int can_multi_conn(void *handle) { return export_of(handle).abilities().multi_conn; }
int can_extents(void *handle) { return export_of(handle).abilities().extents; }
int can_cache(void *handle) { return export_of(handle).abilities().cache ? NBDKIT_CACHE_NATIVE : NBDKIT_CACHE_NONE; }
int is_rotational(void *) { return 0; }

int block_size(void *, uint32_t *minimum, uint32_t *preferred, uint32_t *maximum) {
    // A larger minimum breaks clients with odd sizes; the preferred one is what costs no copying.
    const auto entry = server().gate.enter();
    *minimum = 1;
    const std::uint64_t cluster = server().image ? server().image->geometry().cluster_size() : 0;
    *preferred = static_cast<uint32_t>(std::max<std::uint64_t>(cluster, 4096));
    *maximum = 0xffffffff;
    return 0;
}

const char *export_description(void *handle) {
    return guarded(static_cast<const char *>(nullptr),
                   [&]() -> const char * { return nbdkit_strdup_intern(export_of(handle).description().c_str()); });
}

int pread(void *handle, void *buffer, uint32_t count, uint64_t offset, uint32_t) {
    return request(handle, [&] { export_of(handle).read({static_cast<std::byte *>(buffer), count}, offset); });
}

int pwrite(void *handle, const void *buffer, uint32_t count, uint64_t offset, uint32_t flags) {
    return request(handle, [&] {
        export_of(handle).write({static_cast<const std::byte *>(buffer), count}, offset);
        if (flags & NBDKIT_FLAG_FUA)
            export_of(handle).flush();
    });
}

int flush(void *handle, uint32_t) {
    return request(handle, [&] { export_of(handle).flush(); });
}

int trim(void *handle, uint32_t count, uint64_t offset, uint32_t flags) {
    return request(handle, [&] {
        export_of(handle).trim(offset, count);
        if (flags & NBDKIT_FLAG_FUA)
            export_of(handle).flush();
    });
}

int zero(void *handle, uint32_t count, uint64_t offset, uint32_t flags) {
    return request(handle, [&] {
        export_of(handle).zero(offset, count, flags & NBDKIT_FLAG_MAY_TRIM, flags & NBDKIT_FLAG_FAST_ZERO);
        if (flags & NBDKIT_FLAG_FUA)
            export_of(handle).flush();
    });
}

int extents(void *handle, uint32_t count, uint64_t offset, uint32_t flags, nbdkit_extents *found) {
    return request(handle, [&] {
        const std::size_t most = flags & NBDKIT_FLAG_REQ_ONE ? 1 : 65536;
        export_of(handle).extents(offset, count, most, [&](std::uint64_t at, std::uint64_t n, bool hole, bool zero) {
            const uint32_t type = (hole ? NBDKIT_EXTENT_HOLE : 0) | (zero ? NBDKIT_EXTENT_ZERO : 0);
            return nbdkit_add_extent(found, at, n, type) == 0;
        });
    });
}

int cache(void *handle, uint32_t count, uint64_t offset, uint32_t) {
    if (!export_of(handle).caches_alone())
        return request(handle, [&] { export_of(handle).cache(offset, count); });
    return guarded(-1, [&] {
        export_of(handle).cache(offset, count);
        return 0;
    });
}

nbdkit_plugin plugin = [] {
    nbdkit_plugin p{};
    p.name = "qcow2";
    p.longname = "qlean QCOW2 plugin";
    p.version = QLEAN_VERSION;
    p.description = "serves a QCOW2 image and compacts it in place while it is in use";
    p.config = config;
    p.config_complete = config_complete;
    p.config_help = "[file=]<DISK.qcow2>      (required) The image to serve.\n"
                    "data-file=<FILE>         The image's external data file, if it is not where the image says.\n"
                    "passphrase=+FILE         The passphrase of an encrypted image (or -FD; - asks for it).\n"
                    "metadata-cache=<SIZE>    Memory for L2 tables (default 64M).\n"
                    "repair=none|leaks|all    What to repair before serving (default: a dirty image).\n"
                    "maintenance=yes|no|USERS Who may use more than the disk and its status (default: yes).\n"
                    "check-only=<BOOL>        Serve the export 'check' alone, of any image.";
    p.magic_config_key = "file";
    p.get_ready = get_ready;
    p.after_fork = after_fork;
    p.cleanup = cleanup;
    p.list_exports = list_exports;
    p.default_export = default_export;
    p.open = open;
    p.close = close;
    p.get_size = get_size;
    p.block_size = block_size;
    p.export_description = export_description;
    p.can_write = can_write;
    p.can_flush = can_flush;
    p.can_trim = can_trim;
    p.can_zero = can_zero;
    p.can_fast_zero = can_fast_zero;
    p.can_fua = can_fua;
    p.can_multi_conn = can_multi_conn;
    p.can_extents = can_extents;
    p.can_cache = can_cache;
    p.is_rotational = is_rotational;
    p.pread = pread;
    p.pwrite = pwrite;
    p.flush = flush;
    p.trim = trim;
    p.zero = zero;
    p.extents = extents;
    p.cache = cache;
    return p;
}();

} // namespace

} // namespace qlean::plugin

NBDKIT_REGISTER_PLUGIN(qlean::plugin::plugin)
