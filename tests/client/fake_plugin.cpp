// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// A stand-in for the qcow2 plugin, to test the client with: real nbdkit, real NBD, no image. It offers the maintenance
// exports with plans made up on the command line, misbehaves on demand, and writes down every request it gets.
// State: one bitmap of 64 KiB units per operation, shared by all connections, all of it under one mutex.
//
//   size=SIZE               of every export (default 1G)
//   file=PATH               must begin with the QCOW2 magic, as a stand-in for real image checks
//   exports=A,B,C           operations offered (default zeroes,compact)
//   todo=OP:OFFSET+LENGTH   to do at start; repeatable; sizes take K, M, G
//   pattern=OP:PERIOD:LENGTH  LENGTH to do at each PERIOD
//   cache-ms=N flush-ms=N extents-ms=N   how long each request takes
//   pending=N pending-step=N  metadata clusters to move, and how many one FLUSH moves (default 16)
//   most-by-request=N       status tells of it; CACHE on compact does so much of its range, from the end of it
//   busy=OP                 CACHE fails with EPERM and status names an owner
//   refuse=TEXT             CACHE fails with EPERM and status.last_error is TEXT
//   stale-error=TEXT        status.last_error is TEXT, which is all that status.errors counts
//   error-after=N:ERRNO     the N-th CACHE and all later ones fail with EIO, ENOSPC or ESHUTDOWN
//   flush-error=1           every FLUSH fails with EIO
//   die-after=N             the process ends when the N-th CACHE begins
//   guest-p99=N             status tells of a guest whose requests take N microseconds
//   guest-after=N           but not before the N-th CACHE
//   status-error=1          status cannot be read from the first CACHE to the next FLUSH
//   stuck=OP                CACHE succeeds without doing anything
//   stuck-from=N            CACHE of a range of N bytes and more does
//   version=TEXT            the nbdkit version that status tells ("" leaves it out)
//   log=PATH                one JSON object a line for each request

#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <map>
#include <mutex>
#include <string>
#include <unistd.h>
#include <vector>

#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL

namespace {

using json = nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;

constexpr uint64_t unit = 65536;
constexpr uint64_t page_size = 65536;

struct Settings {
    uint64_t size = uint64_t{1} << 30;
    std::string file;
    std::vector<std::string> operations = {"zeroes", "compact"};
    std::vector<std::pair<std::string, std::string>> todo;    // operation, OFFSET+LENGTH
    std::vector<std::pair<std::string, std::string>> pattern; // operation, PERIOD:LENGTH
    unsigned cache_ms = 0;
    unsigned flush_ms = 0;
    unsigned extents_ms = 0;
    uint64_t pending_step = 16;
    uint64_t most_by_request = 0;
    std::string busy, refuse, stale_error, stuck, version = "1.40.0", log;
    uint64_t error_after = 0;
    int error_number = EIO;
    bool flush_error = false;
    uint64_t die_after = 0;
    uint64_t guest_p99 = 0, guest_after = 0;
    uint64_t stuck_from = UINT64_MAX;
    bool status_error = false;
    bool read_only = false;
};

Settings settings;
std::mutex mutex;
// Below: under the mutex once serving has begun.
std::map<std::string, std::vector<bool>> plans;
uint64_t pending = 0;
uint64_t caches = 0;
bool uncommitted = false; // a CACHE since the last FLUSH
uint64_t connections = 0;
uint64_t file_length = 0;
std::string last_error;
std::ofstream log_stream;

struct Handle {
    std::string name;
    uint64_t id;
    unsigned in_flight = 0;
    std::string page;
};

void record(const char *event, const Handle &handle, json details = json::object()) {
    if (!log_stream.is_open()) {
        return;
    }
    json line = {{"t", std::chrono::duration<double>(Clock::now().time_since_epoch()).count()},
                 {"event", event},
                 {"export", handle.name},
                 {"connection", handle.id},
                 {"in_flight", handle.in_flight}};
    line.update(details);
    log_stream << line.dump() << std::endl;
}

uint64_t number(const std::string &text) {
    const int64_t n = nbdkit_parse_size(text.c_str());
    return n < 0 ? 0 : static_cast<uint64_t>(n);
}

std::pair<std::string, std::string> split(const std::string &text, char at) {
    const auto place = text.find(at);
    return {text.substr(0, place), place == std::string::npos ? "" : text.substr(place + 1)};
}

uint64_t bytes_to_do(const std::string &name) {
    const auto it = plans.find(name);
    return it == plans.end() ? 0 : static_cast<uint64_t>(std::count(it->second.begin(), it->second.end(), true)) * unit;
}

int config(const char *raw_key, const char *raw_value) {
    const std::string key = raw_key;
    const std::string value = raw_value;
    if (key == "size") {
        settings.size = number(value);
    } else if (key == "file") {
        settings.file = value;
    } else if (key == "exports") {
        settings.operations.clear();
        for (std::string rest = value; !rest.empty();) {
            auto [name, tail] = split(rest, ',');
            settings.operations.push_back(name);
            rest = tail;
        }
    } else if (key == "todo") {
        settings.todo.push_back(split(value, ':'));
    } else if (key == "pattern") {
        settings.pattern.push_back(split(value, ':'));
    } else if (key == "cache-ms") {
        settings.cache_ms = static_cast<unsigned>(number(value));
    } else if (key == "flush-ms") {
        settings.flush_ms = static_cast<unsigned>(number(value));
    } else if (key == "extents-ms") {
        settings.extents_ms = static_cast<unsigned>(number(value));
    } else if (key == "pending") {
        pending = number(value);
    } else if (key == "pending-step") {
        settings.pending_step = number(value);
    } else if (key == "most-by-request") {
        settings.most_by_request = number(value);
    } else if (key == "busy") {
        settings.busy = value;
    } else if (key == "refuse") {
        settings.refuse = value;
    } else if (key == "stale-error") {
        settings.stale_error = value;
    } else if (key == "error-after") {
        const auto [count, name] = split(value, ':');
        settings.error_after = number(count);
        settings.error_number = name == "ENOSPC" ? ENOSPC : name == "ESHUTDOWN" ? ESHUTDOWN : EIO;
    } else if (key == "flush-error") {
        settings.flush_error = true;
    } else if (key == "die-after") {
        settings.die_after = number(value);
    } else if (key == "guest-p99") {
        settings.guest_p99 = number(value);
    } else if (key == "guest-after") {
        settings.guest_after = number(value);
    } else if (key == "stuck-from") {
        settings.stuck_from = number(value);
    } else if (key == "status-error") {
        settings.status_error = true;
    } else if (key == "stuck") {
        settings.stuck = value;
    } else if (key == "version") {
        settings.version = value;
    } else if (key == "log") {
        settings.log = value;
    } else {
        nbdkit_error("unknown parameter %s", raw_key);
        return -1;
    }
    return 0;
}

// The private server passes only file=; a file SETTINGS.fake beside the image holds the rest, one key=value a line.
int config_complete() {
    if (settings.file.empty()) {
        return 0;
    }
    std::ifstream extra(settings.file + ".fake");
    for (std::string line; std::getline(extra, line);) {
        const auto [key, value] = split(line, '=');
        if (config(key.c_str(), value.c_str()) == -1) {
            return -1;
        }
    }
    return 0;
}

int get_ready() {
    if (!settings.file.empty()) {
        char magic[4] = {};
        std::ifstream(settings.file).read(magic, sizeof magic);
        if (std::memcmp(magic, "QFI\xfb", 4) != 0) {
            nbdkit_error("%s: this is not a QCOW2 image", settings.file.c_str());
            return -1;
        }
    }
    const uint64_t units = settings.size / unit;
    for (const auto &name : settings.operations) {
        plans[name].assign(units, false);
    }
    for (const auto &[name, text] : settings.todo) {
        const auto [offset, length] = split(text, '+');
        std::fill_n(plans[name].begin() + static_cast<long>(number(offset) / unit), number(length) / unit, true);
    }
    for (const auto &[name, text] : settings.pattern) {
        const auto [period, length] = split(text, ':');
        for (uint64_t i = 0; i < units; i++) {
            plans[name][i] = i * unit % number(period) < number(length);
        }
    }
    file_length = (units + 16) * unit;
    if (!settings.log.empty()) {
        log_stream.open(settings.log, std::ios::app);
    }
    return 0;
}

int list_exports(int, int, nbdkit_exports *exports) {
    nbdkit_add_export(exports, "", nullptr);
    for (const auto &name : settings.operations) {
        nbdkit_add_export(exports, name.c_str(), nullptr);
    }
    return nbdkit_add_export(exports, "status", nullptr);
}

const char *default_export(int, int) { return ""; }

void *open_handle(int readonly) {
    const std::lock_guard lock(mutex);
    const std::string name = nbdkit_export_name();
    if (!name.empty() && name != "status" && plans.count(name) == 0) {
        nbdkit_error("no export %s", name.c_str());
        return nullptr;
    }
    settings.read_only = readonly != 0;
    auto *handle = new Handle{name, ++connections, 0, {}};
    record("open", *handle);
    return handle;
}

Handle &of(void *handle) { return *static_cast<Handle *>(handle); }

void close_handle(void *handle) {
    const std::lock_guard lock(mutex);
    record("close", of(handle));
    delete &of(handle);
}

int64_t get_size(void *handle) { return static_cast<int64_t>(of(handle).name == "status" ? page_size : settings.size); }
int can_write(void *handle) { return of(handle).name.empty() ? 1 : 0; }
int yes(void *) { return 1; }
int can_extents(void *handle) { return of(handle).name != "status"; }
int can_cache(void *handle) {
    return of(handle).name == "status" || settings.read_only ? NBDKIT_CACHE_NONE : NBDKIT_CACHE_NATIVE;
}

std::string make_page() {
    const uint64_t left = bytes_to_do("compact");
    json server = {{"pid", ::getpid()}, {"read_only", settings.read_only}};
    if (!settings.version.empty()) {
        server["nbdkit"] = settings.version;
    }
    json owner;
    if (!settings.busy.empty()) {
        owner = {{"export", settings.busy}, {"connection", 77}};
    }
    json page = {{"qlean", 1},
                 {"version", "0.0-fake"},
                 {"server", server},
                 {"image", {{"file", settings.file}, {"virtual_size", settings.size}, {"cluster_size", unit}}},
                 {"file", {{"length", file_length}, {"allocated", file_length / 2}}},
                 {"clusters",
                  {{"in_use", 100}, {"data", 90}, {"metadata", 10}, {"pinned", 0}, {"retired", 0}, {"free", nullptr}}},
                 {"fragmentation", {{"allocated", 90}, {"fragmented", left != 0 ? 45 : 0}}},
                 {"compact", {{"ideal_end", 100 * unit}, {"pending", pending}}},
                 {"maintenance", {{"owner", owner}}},
                 {"poisoned", false},
                 {"a_field_from_the_future", {1, 2, 3}},
                 {"last_error", last_error.empty() ? json() : json(last_error)}};
    if (!settings.stale_error.empty()) {
        page["last_error"] = settings.stale_error;
        page["errors"] = 1;
    }
    if (settings.most_by_request != 0) {
        page["compact"]["most_by_request"] = settings.most_by_request;
    }
    if (settings.guest_p99 != 0 && caches >= settings.guest_after) {
        page["guest"]["latency_us"]["p99"] = settings.guest_p99;
    }
    std::string text = page.dump();
    text.resize(page_size - 1, ' ');
    return text + "\n";
}

int pread(void *handle, void *buffer, uint32_t count, uint64_t offset, uint32_t) {
    const std::lock_guard lock(mutex);
    Handle &h = of(handle);
    if (h.name == "status") {
        if (settings.status_error && uncommitted) {
            record("status-error", h);
            nbdkit_set_error(EIO);
            return -1;
        }
        if (offset == 0 || h.page.empty()) {
            h.page = make_page();
        }
        std::memcpy(buffer, h.page.data() + offset, count);
        return 0;
    }
    record("pread", h);
    if (!h.name.empty()) {
        nbdkit_set_error(EPERM);
        return -1;
    }
    std::memset(buffer, 0, count);
    return 0;
}

int pwrite(void *, const void *, uint32_t, uint64_t, uint32_t) { return 0; }

void linger(unsigned milliseconds) {
    if (milliseconds != 0) {
        nbdkit_nanosleep(milliseconds / 1000, milliseconds % 1000 * 1000000);
    }
}

int extents(void *handle, uint32_t count, uint64_t offset, uint32_t, nbdkit_extents *out) {
    Handle &h = of(handle);
    {
        const std::lock_guard lock(mutex);
        record("extents", h, {{"offset", offset}, {"length", count}});
    }
    linger(settings.extents_ms);
    const std::lock_guard lock(mutex);
    const auto plan = plans.find(h.name);
    const uint64_t end = offset + count;
    for (uint64_t at = offset; at < end;) {
        const auto todo = [&](uint64_t place) { return plan != plans.end() && plan->second[place / unit]; };
        const bool first = todo(at);
        uint64_t next = at;
        while (next < end && todo(next) == first) {
            next = std::min(end, (next / unit + 1) * unit);
        }
        if (nbdkit_add_extent(out, at, next - at, first ? 0 : NBDKIT_EXTENT_HOLE) == -1) {
            return -1;
        }
        at = next;
    }
    return 0;
}

// The errno to answer with, or 0.
int refuse_cache(Handle &h) {
    caches += 1;
    uncommitted = true;
    if (settings.die_after != 0 && caches >= settings.die_after) {
        record("die", h);
        ::_exit(0);
    }
    if (!settings.busy.empty()) {
        return EPERM;
    }
    if (!settings.refuse.empty()) {
        last_error = settings.refuse;
        return EPERM;
    }
    if (settings.error_after != 0 && caches >= settings.error_after) {
        if (settings.error_number != ESHUTDOWN) {
            last_error = "disk.qcow2: writing at 4096 failed: it was told to";
        }
        return settings.error_number;
    }
    return 0;
}

int cache(void *handle, uint32_t count, uint64_t offset, uint32_t) {
    Handle &h = of(handle);
    std::unique_lock lock(mutex);
    h.in_flight += 1;
    record("cache", h, {{"offset", offset}, {"length", count}});
    const int error = refuse_cache(h);
    lock.unlock();
    if (error == 0) {
        linger(settings.cache_ms);
    }
    lock.lock();
    if (error == 0 && h.name != settings.stuck && count < settings.stuck_from) {
        auto &plan = plans[h.name];
        uint64_t most = h.name == "compact" && settings.most_by_request != 0 ? settings.most_by_request : settings.size;
        for (uint64_t at = (offset + count + unit - 1) / unit; at > offset / unit && most >= unit; at--) {
            most -= plan[at - 1] ? unit : 0;
            plan[at - 1] = false;
        }
    }
    record("cache-end", h, {{"offset", offset}, {"length", count}, {"error", error}});
    h.in_flight -= 1;
    if (error != 0) {
        nbdkit_set_error(error);
        return -1;
    }
    return 0;
}

int flush(void *handle, uint32_t) {
    Handle &h = of(handle);
    std::unique_lock lock(mutex);
    h.in_flight += 1;
    uncommitted = false;
    record("flush", h);
    lock.unlock();
    linger(settings.flush_ms);
    lock.lock();
    if (h.name == "compact") {
        pending -= std::min(pending, settings.pending_step);
        file_length = 100 * unit + bytes_to_do("compact") + pending * unit;
    }
    record("flush-end", h);
    h.in_flight -= 1;
    if (settings.flush_error) {
        last_error = "disk.qcow2: fdatasync failed: it was told to";
        nbdkit_set_error(EIO);
        return -1;
    }
    return 0;
}

nbdkit_plugin make_plugin() {
    nbdkit_plugin p{};
    p.name = "fakeqcow2";
    p.version = "0";
    p.config = config;
    p.config_complete = config_complete;
    p.magic_config_key = "file";
    p.get_ready = get_ready;
    p.list_exports = list_exports;
    p.default_export = default_export;
    p.open = open_handle;
    p.close = close_handle;
    p.get_size = get_size;
    p.can_write = can_write;
    p.can_flush = yes;
    p.can_extents = can_extents;
    p.can_cache = can_cache;
    p.pread = pread;
    p.pwrite = pwrite;
    p.extents = extents;
    p.cache = cache;
    p.flush = flush;
    return p;
}

nbdkit_plugin plugin = make_plugin();

} // namespace

NBDKIT_REGISTER_PLUGIN(plugin)
