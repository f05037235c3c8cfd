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

/// How long making the image durable may take after an abort, which may have left anything locked.
constexpr unsigned abort_seconds = 10;

// A signal handler may use nothing but these.
int wake_fd = -1;
volatile std::sig_atomic_t aborting = 0;

void on_signal(int) {
    const int saved = errno;
    const std::uint64_t one = 1;
    [[maybe_unused]] const auto n = ::write(wake_fd, &one, sizeof one);
    errno = saved;
}

/// nbdkit 1.32 aborts when a client dies at the wrong moment. What the guest was told is written need not be lost with
/// it: this thread stops here, and the one that waits for signals ends the process in order. An abort of our own, an
/// assertion or a heap that is no more, is another matter: what is in memory must not be written then.
void on_abort(int signal, siginfo_t *info, void *) {
    const bool own = info->si_code == SI_TKILL && info->si_pid == ::getpid();
    if (own && at_work != 0) {
        ::signal(signal, SIG_DFL);
        ::raise(signal); // arrives when this returns
        return;
    }
    aborting = 1;
    on_signal(signal);
    while (own)
        ::pause();
}

/// Everything is durable and closed by then. nbdkit frees what a connection that was accepted just before is about to
/// use.
void on_late_crash(int) {
    constexpr char said[] = "nbdkit: qcow2: nbdkit crashed while it ended; the image had been closed before that\n";
    [[maybe_unused]] const auto n = ::write(STDERR_FILENO, said, sizeof said - 1);
    ::_exit(EXIT_SUCCESS);
}

} // namespace

bool Gate::shut(const std::function<bool()> &leave) {
    closing_.store(true, std::memory_order_release);
    std::call_once(left_, [&] {
        doors_.lock();
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
        const AtWork working;
        if (aborting) {
            ::alarm(abort_seconds); // should a lock have died with the thread: SIGALRM ends the process
            shut(leave);
            ::_exit(128 + SIGABRT);
        }
        const bool well = shut(leave);
        if (well && connections_.load() == 0) {
            ::signal(SIGSEGV, on_late_crash);
            {
                const Lock guard(shutdown_);
                nbdkit_shutdown();
            }
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
    action.sa_sigaction = on_abort;
    action.sa_flags = SA_SIGINFO | SA_RESTART;
    ::sigaction(SIGABRT, &action, nullptr);
}

} // namespace qlean::plugin
