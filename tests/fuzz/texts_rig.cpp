// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "tests/fuzz/texts_rig.h"

#include "client/failure.h"
#include "client/target.h"
#include "plugin/nbdkit.h"
#include "tests/fuzz/image_cases.h"
#include "tests/fuzz/input.h"
#include "tests/fuzz/memory_file.h"

#include <cstring>

// --- nbdkit -------------------------------------------------------------------------------------------------------

void nbdkit_error(const char *, ...) {}
void nbdkit_set_error(int) {}
void nbdkit_shutdown() {}
int nbdkit_nanosleep(unsigned, unsigned) { return 0; }
std::int64_t nbdkit_peer_uid() { return 1000; }
char *nbdkit_absolute_path(const char *path) { return *path == 0 ? nullptr : ::strdup(path); }
int nbdkit_read_password(const char *value, char **password) {
    *password = ::strdup(value + 1);
    return 0;
}
std::int64_t nbdkit_parse_size(const char *text) { return std::strtoll(text, nullptr, 10); }
int nbdkit_parse_bool(const char *text) { return *text == '1' ? 1 : *text == '0' ? 0 : -1; }

namespace qlean::fuzz {

plugin::Server &served_image() {
    static plugin::Server *server = [] {
        auto *made = new plugin::Server;
        for (const ImageCase &one : image_cases())
            if (!one.snapshots.empty()) {
                Image::Options options;
                options.cache_bytes = 65536;
                made->image =
                    Image::open(std::make_unique<MemoryFile>(std::make_shared<MemoryDisk>(one.bytes)), options);
                made->options.file = "/images/fuzzed.qcow2";
                break;
            }
        return made;
    }();
    return *server;
}

std::string &served_text() {
    static std::string text;
    return text;
}

namespace {
std::uint64_t served_size = 0;
}

std::unique_ptr<Connection> connect(std::uint64_t size) {
    static const Target target("nbd://nowhere", Access::read_only, {});
    served_size = size;
    return std::make_unique<Connection>(target, "status");
}

} // namespace qlean::fuzz

// --- the client's connection --------------------------------------------------------------------------------------

namespace qlean {

PrivateServer::~PrivateServer() = default;
Target::Target(const std::string &text, Access, const Nbdkit &, const std::vector<std::string> &) : name_(text) {}

void Connection::Deleter::operator()(nbd_handle *) const {}
Connection::Connection(const Target &target, const std::string &export_name)
    : target_(target), export_name_(export_name), size_(fuzz::served_size) {}
Connection::~Connection() = default;
bool Connection::has_block_status() const { return true; }

std::string Connection::read(std::uint64_t offset, std::size_t length) {
    return fuzz::served_text().substr(offset, length);
}

/// A few extents at a time, of any length and kind: 3 bytes each.
std::uint64_t Connection::block_status(std::uint64_t offset, std::uint64_t,
                                       const std::function<void(const Extent &)> &each) {
    std::string &text = fuzz::served_text();
    fuzz::Input in(reinterpret_cast<const std::uint8_t *>(text.data()), text.size());
    std::uint64_t end = offset;
    for (auto n = 1 + in.byte() % 8; n > 0; --n) {
        const std::uint64_t kind = in.byte(), length = 1 + (in.number(2) << kind % 24);
        each({end, length, kind % 3 == 0});
        end += length;
    }
    text = in.text();
    return text.empty() ? std::max(end, size_) : end;
}

} // namespace qlean
