// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "gate.h"

#include "lib/error.h"
#include "nbdkit.h"

#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <sys/eventfd.h>
#include <thread>
#include <unistd.h>

namespace qlean::plugin {

namespace {

/// How long nbdkit may take to end when nobody is connected.
constexpr auto patience = std::chrono::seconds(2);

int wake_fd = -1; // a signal handler may use nothing but this

void on_signal(int) {
    const int saved = errno;
    const std::uint64_t one = 1;
    [[maybe_unused]] const auto n = ::write(wake_fd, &one, sizeof one);
    errno = saved;
}

} // namespace

bool Gate::shut(const std::function<bool()> &leave) {
    closing_.store(true, std::memory_order_release);
    std::call_once(left_, [&] {
        lock_.lock();
        left_well_ = leave();
    });
    return left_well_;
}

void Gate::own_signals(std::function<bool()> leave) {
    wake_fd = ::eventfd(0, EFD_CLOEXEC);
    if (wake_fd == -1)
        throw_io(errno, "cannot watch for signals");
    std::thread([this, leave = std::move(leave)] {
        std::uint64_t count;
        while (::read(wake_fd, &count, sizeof count) == -1 && errno == EINTR) {
        }
        const bool well = shut(leave);
        if (well && connections_.load() == 0) {
            nbdkit_shutdown();
            std::this_thread::sleep_for(patience);
        }
        ::_exit(well ? EXIT_SUCCESS : EXIT_FAILURE);
    }).detach();
    struct sigaction action {};
    action.sa_handler = on_signal;
    action.sa_flags = SA_RESTART;
    sigemptyset(&action.sa_mask);
    for (const int signal : {SIGTERM, SIGINT, SIGHUP, SIGQUIT})
        ::sigaction(signal, &action, nullptr);
}

} // namespace qlean::plugin
