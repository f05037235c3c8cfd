// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// A test plugin: a disk in memory that stops on command inside a request, so that a race can be replayed step by step.
//
// With gate=DIR, a request of kind OP (pwrite, trim, zero) that finds the file DIR/hold-OP-before or DIR/hold-OP-after
// at that point (before or after it changes the disk) renames it to DIR/held-OP and stays until that file is gone.
// One file holds one request. A file DIR/fail-OP makes the request fail. With delay=N every change takes up to N
// microseconds before and after. There is an export `status` with the cluster size in it, as the real plugin has.

#define NBDKIT_API_VERSION 2

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include <nbdkit-plugin.h>
#include <unistd.h>

#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL

namespace {

std::vector<std::atomic<unsigned char>> *disk;
std::string gate;
std::string status;
std::int64_t disk_size = 1 << 20;
unsigned delay_us = 0;
unsigned cluster = 65536;

std::atomic<unsigned> noise{1};

void delay() {
    if (delay_us > 0)
        usleep((noise.fetch_add(2654435761u) >> 8) % delay_us);
}

void hold(const std::string &op, const char *when) {
    delay();
    if (gate.empty())
        return;
    const std::string held = gate + "/held-" + op;
    if (rename((gate + "/hold-" + op + "-" + when).c_str(), held.c_str()) == -1)
        return;
    while (access(held.c_str(), F_OK) == 0)
        usleep(1000);
}

template <typename F>
int change(const char *op, F f) {
    hold(op, "before");
    if (!gate.empty() && access((gate + "/fail-" + op).c_str(), F_OK) == 0) {
        nbdkit_set_error(EIO);
        return -1;
    }
    f();
    hold(op, "after");
    return 0;
}

bool is_status(void *handle) { return handle == &status; }

int config(const char *key, const char *value) {
    if (strcmp(key, "size") == 0)
        disk_size = nbdkit_parse_size(value);
    else if (strcmp(key, "gate") == 0)
        gate = value;
    else if (strcmp(key, "delay") == 0)
        return nbdkit_parse_unsigned("delay", value, &delay_us);
    else if (strcmp(key, "cluster") == 0)
        return nbdkit_parse_unsigned("cluster", value, &cluster);
    else
        return -1;
    return 0;
}

int get_ready() {
    disk = new std::vector<std::atomic<unsigned char>>(static_cast<std::size_t>(disk_size));
    status = "{\"qlean\": 1, \"image\": {\"cluster_size\": " + std::to_string(cluster) + "}}";
    status.resize(65535, ' ');
    status += '\n';
    return 0;
}

int list_exports(int, int, nbdkit_exports *exports) {
    return nbdkit_add_export(exports, "", nullptr) || nbdkit_add_export(exports, "status", nullptr) ? -1 : 0;
}

void *open(int) {
    const char *name = nbdkit_export_name();
    return name && strcmp(name, "status") == 0 ? static_cast<void *>(&status) : static_cast<void *>(&disk);
}

std::int64_t get_size(void *h) { return is_status(h) ? static_cast<std::int64_t>(status.size()) : disk_size; }

int writable(void *h) { return !is_status(h); }

int yes(void *) { return 1; }

int can_fua(void *) { return NBDKIT_FUA_NATIVE; }

int pread(void *h, void *buffer, std::uint32_t count, std::uint64_t offset, std::uint32_t) {
    auto *bytes = static_cast<unsigned char *>(buffer);
    for (std::uint32_t i = 0; i < count; i++)
        bytes[i] = is_status(h) ? static_cast<unsigned char>(status[offset + i])
                                : (*disk)[offset + i].load(std::memory_order_relaxed);
    return 0;
}

int pwrite(void *, const void *buffer, std::uint32_t count, std::uint64_t offset, std::uint32_t) {
    const auto *bytes = static_cast<const unsigned char *>(buffer);
    return change("pwrite", [&] {
        for (std::uint32_t i = 0; i < count; i++)
            (*disk)[offset + i].store(bytes[i], std::memory_order_relaxed);
    });
}

void clear(std::uint32_t count, std::uint64_t offset) {
    for (std::uint32_t i = 0; i < count; i++)
        (*disk)[offset + i].store(0, std::memory_order_relaxed);
}

int trim(void *, std::uint32_t count, std::uint64_t offset, std::uint32_t) {
    return change("trim", [&] { clear(count, offset); });
}

int zero(void *, std::uint32_t count, std::uint64_t offset, std::uint32_t) {
    return change("zero", [&] { clear(count, offset); });
}

int flush(void *, std::uint32_t) { return 0; }

nbdkit_plugin plugin = [] {
    nbdkit_plugin p{};
    p.name = "hold";
    p.config = config;
    p.get_ready = get_ready;
    p.list_exports = list_exports;
    p.open = open;
    p.get_size = get_size;
    p.can_write = writable;
    p.can_flush = yes;
    p.can_fua = can_fua;
    p.can_multi_conn = yes;
    p.can_fast_zero = yes;
    p.pread = pread;
    p.pwrite = pwrite;
    p.trim = trim;
    p.zero = zero;
    p.flush = flush;
    return p;
}();

} // namespace

NBDKIT_REGISTER_PLUGIN(plugin)
