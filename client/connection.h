// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// One NBD connection to one export: RAII over nbd_handle. Destruction says goodbye to the server (NBD_CMD_DISC) and
// waits for the answer to everything in flight first: some nbdkit versions abort when a client with several requests
// in flight simply vanishes, and that server may be holding a guest's disk.
#pragma once

#include "failure.h"

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

struct nbd_handle;

namespace qlean {

class Target;

// The text of this thread's last libnbd error without the name of the C function.
std::string nbd_error_text();

// An asynchronous request. It must stay where it is until done or until the connection is gone.
struct Ticket {
    bool done = false;
    int error = 0; // errno of a finished request, 0 for success
};

struct Extent {
    std::uint64_t offset;
    std::uint64_t length;
    bool hole;
};

// The server answered a request with an error: over the connection only its number came.
class RequestRefused : public Failure {
  public:
    using Failure::Failure;
};

// Throws if that is all that a server lists for whom it does not let maintain the disk.
void require_maintainer(const std::vector<std::string> &exports);

class Connection {
  public:
    // Throws if the server cannot be reached or has no such export.
    Connection(const Target &target, const std::string &export_name);
    ~Connection();
    Connection(const Connection &) = delete;
    Connection &operator=(const Connection &) = delete;

    // The names the server lists, or nothing if it keeps its list to itself.
    static std::vector<std::string> list_exports(const Target &target);

    const std::string &export_name() const { return export_name_; }
    std::uint64_t size() const { return size_; }
    bool can_cache() const;
    bool has_block_status() const;

    std::string read(std::uint64_t offset, std::size_t length);

    // One request: calls back for extents from `offset` on, in order; the server may stop short of `length` or run
    // past it. Returns the end of what it described.
    std::uint64_t block_status(std::uint64_t offset, std::uint64_t length,
                               const std::function<void(const Extent &)> &each);

    void start_cache(std::uint64_t offset, std::uint64_t length, Ticket &ticket);
    void start_flush(Ticket &ticket);

    // Until it is done, with an error if the connection is lost meanwhile.
    void wait(Ticket &ticket);

    // Lets requests make progress for at most that long; returns early on any event on the connection or a signal.
    void pump(int milliseconds);

    bool lost() const;

    // Waits for everything in flight and disconnects. Afterwards only destruction is allowed.
    void close() noexcept;

  private:
    [[noreturn]] void fail(const std::string &what) const;

    struct Deleter {
        void operator()(nbd_handle *handle) const;
    };
    const Target &target_;
    std::string export_name_;
    std::unique_ptr<nbd_handle, Deleter> handle_;
    std::uint64_t size_ = 0;
};

} // namespace qlean
