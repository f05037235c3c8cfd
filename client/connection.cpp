// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// libnbd's callbacks are C: nothing may throw through them, so they store and the caller rethrows.
#include "connection.h"

#include "failure.h"
#include "signals.h"
#include "target.h"

#include <fmt/format.h>
#include <libnbd.h>

#include <algorithm>
#include <cerrno>
#include <exception>
#include <poll.h>

namespace qlean {

namespace {

int finish_ticket(void *user_data, int *error) {
    auto *ticket = static_cast<Ticket *>(user_data);
    ticket->done = true;
    ticket->error = *error;
    return 1; // retire the command: nobody asks libnbd about it again
}

nbd_completion_callback completion(Ticket &ticket) {
    ticket = Ticket{};
    return {.callback = finish_ticket, .user_data = &ticket, .free = nullptr};
}

struct ExtentSink {
    const std::function<void(const Extent &)> *each;
    std::uint64_t end;
    std::exception_ptr thrown;
};

int collect_extents(void *user_data, const char *context, std::uint64_t offset, std::uint32_t *entries,
                    std::size_t count, int *error) {
    auto *sink = static_cast<ExtentSink *>(user_data);
    if (std::string_view(context) != LIBNBD_CONTEXT_BASE_ALLOCATION || *error != 0) {
        return 0;
    }
    try {
        for (std::size_t i = 0; i + 1 < count; i += 2) {
            (*sink->each)({offset, entries[i], (entries[i + 1] & LIBNBD_STATE_HOLE) != 0});
            offset += entries[i];
        }
        sink->end = offset;
    } catch (...) {
        sink->thrown = std::current_exception();
        *error = ECANCELED;
        return -1;
    }
    return 0;
}

int collect_name(void *user_data, const char *name, const char *) {
    try {
        static_cast<std::vector<std::string> *>(user_data)->emplace_back(name);
    } catch (...) {
        return -1;
    }
    return 0;
}

nbd_handle *negotiate(const Target &target) {
    nbd_handle *handle = ::nbd_create();
    if (handle == nullptr) {
        throw Failure(fmt::format("cannot create an NBD handle: {}", nbd_error_text()));
    }
    try {
        ::nbd_set_opt_mode(handle, true);
        // The user typed the URI, so key files it names are the user's own.
        ::nbd_set_uri_allow_local_file(handle, true);
        ::nbd_add_meta_context(handle, LIBNBD_CONTEXT_BASE_ALLOCATION);
        target.connect(handle);
        if (::nbd_aio_is_negotiating(handle) != 1) {
            throw Failure(fmt::format(
                "{} speaks the old NBD protocol, which has no named exports; it is not a qlean server", target.name()));
        }
    } catch (...) {
        ::nbd_close(handle);
        throw;
    }
    return handle;
}

// Nothing if it does not answer a second time: what it said first is to be told then.
std::vector<std::string> exports_listed_again(const Target &target) {
    try {
        return Connection::list_exports(target);
    } catch (const Failure &) {
        return {};
    }
}

bool is_for_all(const std::string &name) { return name.empty() || name == "status"; }

} // namespace

void require_maintainer(const std::vector<std::string> &exports) {
    // Its status shows that the server is ours.
    if (std::find(exports.begin(), exports.end(), "status") != exports.end() &&
        std::all_of(exports.begin(), exports.end(), is_for_all)) {
        throw Failure("this server does not let you maintain the disk: its 'maintenance' parameter says who may");
    }
}

std::string nbd_error_text() {
    const char *raw = ::nbd_get_error();
    std::string text = raw == nullptr ? "unknown error" : raw;
    const auto colon = text.find(": ");
    if (text.rfind("nbd_", 0) == 0 && colon != std::string::npos) {
        text.erase(0, colon + 2);
    }
    return text;
}

void Connection::Deleter::operator()(nbd_handle *handle) const { ::nbd_close(handle); }

Connection::Connection(const Target &target, const std::string &export_name)
    : target_(target), export_name_(export_name), handle_(negotiate(target)) {
    // The URI may name an export of its own (usually the disk): ours replaces it.
    if (::nbd_set_export_name(handle_.get(), export_name.c_str()) == -1 || ::nbd_opt_go(handle_.get()) == -1) {
        const int error = ::nbd_get_errno();
        const std::string text = nbd_error_text();
        if (::nbd_aio_is_negotiating(handle_.get()) == 1) {
            ::nbd_opt_abort(handle_.get());
        }
        if (error == ENOENT || error == EINVAL) {
            if (!is_for_all(export_name)) {
                require_maintainer(exports_listed_again(target));
            }
            throw Failure(fmt::format("{} has no export '{}', or cannot open it; is it nbdkit with the qcow2 plugin of "
                                      "qlean? Its log may say more{}",
                                      target.name(), export_name, target.server_words()));
        }
        const char *const hint = error == ENOTSUP ? "; if it requires TLS, use nbds:// or nbds+unix://" : "";
        throw Failure(fmt::format("cannot open export '{}' of {}: {}{}{}", export_name, target.name(), text, hint,
                                  target.server_words()));
    }
    const auto size = ::nbd_get_size(handle_.get());
    if (size < 0) {
        fail("ask for the size");
    }
    size_ = static_cast<std::uint64_t>(size);
}

Connection::~Connection() { close(); }

std::vector<std::string> Connection::list_exports(const Target &target) {
    const std::unique_ptr<nbd_handle, Deleter> handle(negotiate(target));
    std::vector<std::string> names;
    const nbd_list_callback callback{.callback = collect_name, .user_data = &names, .free = nullptr};
    if (::nbd_opt_list(handle.get(), callback) == -1) {
        names.clear();
    }
    if (::nbd_aio_is_negotiating(handle.get()) == 1) {
        ::nbd_opt_abort(handle.get());
    }
    return names;
}

bool Connection::can_cache() const { return ::nbd_can_cache(handle_.get()) == 1; }

bool Connection::has_block_status() const {
    return ::nbd_can_meta_context(handle_.get(), LIBNBD_CONTEXT_BASE_ALLOCATION) == 1;
}

std::string Connection::read(std::uint64_t offset, std::size_t length) {
    std::string data(length, '\0');
    if (::nbd_pread(handle_.get(), data.data(), length, offset, 0) == -1) {
        fail("read");
    }
    return data;
}

std::uint64_t Connection::block_status(std::uint64_t offset, std::uint64_t length,
                                       const std::function<void(const Extent &)> &each) {
    ExtentSink sink{&each, offset, nullptr};
    const nbd_extent_callback callback{.callback = collect_extents, .user_data = &sink, .free = nullptr};
    const int result = ::nbd_block_status(handle_.get(), length, offset, callback, 0);
    if (sink.thrown) {
        std::rethrow_exception(sink.thrown);
    }
    if (result == -1) {
        fail("read the plan");
    }
    if (sink.end <= offset) {
        throw Failure(fmt::format("{}: the server answered block status of export '{}' at {} with nothing",
                                  target_.name(), export_name_, offset));
    }
    return sink.end;
}

void Connection::start_cache(std::uint64_t offset, std::uint64_t length, Ticket &ticket) {
    if (::nbd_aio_cache(handle_.get(), length, offset, completion(ticket), 0) == -1) {
        ticket = {.done = true, .error = ::nbd_get_errno()};
    }
}

void Connection::start_flush(Ticket &ticket) {
    if (::nbd_aio_flush(handle_.get(), completion(ticket), 0) == -1) {
        ticket = {.done = true, .error = ::nbd_get_errno()};
    }
}

void Connection::pump(int milliseconds) {
    const unsigned direction = ::nbd_aio_get_direction(handle_.get());
    const bool reads = (direction & LIBNBD_AIO_DIRECTION_READ) != 0;
    const bool writes = (direction & LIBNBD_AIO_DIRECTION_WRITE) != 0;
    pollfd waits[2] = {{lost() ? -1 : ::nbd_aio_get_fd(handle_.get()),
                        static_cast<short>((reads ? POLLIN : 0) | (writes ? POLLOUT : 0)), 0},
                       // Once the wish to stop is known, a readable pipe would only make this loop spin.
                       {signals::stop_requested() ? -1 : signals::wake_fd(), POLLIN, 0}};
    if (::poll(waits, 2, milliseconds) <= 0) {
        return;
    }
    // A failure here is not lost: libnbd completes every request in flight with an error, and lost() tells.
    if (reads && (waits[0].revents & (POLLIN | POLLHUP | POLLERR)) != 0) {
        ::nbd_aio_notify_read(handle_.get());
    } else if (writes && (waits[0].revents & (POLLOUT | POLLHUP | POLLERR)) != 0) {
        ::nbd_aio_notify_write(handle_.get());
    }
}

void Connection::wait(Ticket &ticket) {
    while (!ticket.done && !lost()) {
        pump(1000);
    }
    if (!ticket.done) {
        ticket = {.done = true, .error = ENOTCONN};
    }
}

bool Connection::lost() const {
    return ::nbd_aio_is_dead(handle_.get()) == 1 || ::nbd_aio_is_closed(handle_.get()) == 1;
}

void Connection::close() noexcept {
    nbd_handle *handle = handle_.get();
    if (handle == nullptr) {
        return;
    }
    while (!lost() && ::nbd_aio_in_flight(handle) > 0) {
        pump(-1);
    }
    if (!lost()) {
        ::nbd_shutdown(handle, 0);
    }
    handle_.reset();
}

void Connection::fail(const std::string &what) const {
    const int error = ::nbd_get_errno();
    const std::string text = nbd_error_text();
    if (lost() || error == ESHUTDOWN || error == ENOTCONN) {
        throw Failure(fmt::format("the server went away while we tried to {} export '{}' of {}{}", what, export_name_,
                                  target_.name(), target_.server_words()),
                      ExitCode::server_gone);
    }
    throw RequestRefused(fmt::format("cannot {} export '{}' of {}: {}{}", what, export_name_, target_.name(), text,
                                     target_.server_words()));
}

} // namespace qlean
