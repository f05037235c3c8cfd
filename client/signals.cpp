// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Everything the handler touches is a lock-free atomic or a buffer that is complete before the flag announcing it.
#include "signals.h"

#include "failure.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <climits>
#include <csignal>
#include <cstring>
#include <fcntl.h>
#include <string_view>
#include <sys/time.h>
#include <unistd.h>

namespace qlean::signals {

namespace {

std::atomic<int> caught{0};
std::atomic<bool> begun{true};
std::atomic<int> write_end{-1};
int read_end = -1;

char socket_buffer[PATH_MAX];
char directory_buffer[PATH_MAX];
std::atomic<bool> leftovers{false};

static_assert(std::atomic<int>::is_always_lock_free && std::atomic<bool>::is_always_lock_free);

void handler(int number) {
    const int saved = errno;
    int nobody = 0;
    if (write_end.load() != -1 && begun.load() && number != SIGQUIT && caught.compare_exchange_strong(nobody, number)) {
        const char byte = 0;
        // The pipe is only a wake-up; the flag above is what counts, so a full pipe does not matter.
        [[maybe_unused]] const auto written = ::write(write_end.load(), &byte, 1);
    } else {
        if (leftovers.load()) {
            ::unlink(socket_buffer);
            ::rmdir(directory_buffer);
        }
        if (!begun.load() && number != SIGQUIT) {
            constexpr std::string_view by_signal = "qlean: stopped by a signal; nothing was begun\n",
                                       by_limit = "qlean: stopped by --max-time; nothing was begun\n";
            const std::string_view words = number == SIGALRM ? by_limit : by_signal;
            [[maybe_unused]] const auto written = ::write(STDERR_FILENO, words.data(), words.size());
            ::_exit(static_cast<int>(ExitCode::stopped));
        }
        ::signal(number, SIG_DFL);
        ::raise(number);
    }
    errno = saved;
}

void catch_one(int number) {
    struct sigaction action {};
    action.sa_handler = handler;
    action.sa_flags = SA_RESTART; // calls that libnbd makes for us finish; our own poll() is woken by the pipe
    ::sigaction(number, &action, nullptr);
}

void catch_signals() {
    for (const int number : {SIGINT, SIGTERM, SIGHUP, SIGQUIT}) {
        struct sigaction old {};
        ::sigaction(number, nullptr, &old);
        if ((number == SIGHUP || number == SIGQUIT) && old.sa_handler == SIG_IGN) {
            continue;
        }
        catch_one(number);
    }
}

} // namespace

void install() {
    int ends[2];
    if (::pipe2(ends, O_CLOEXEC | O_NONBLOCK) == -1) {
        throw Failure(std::string("cannot create the pipe that signals wake us with: ") + std::strerror(errno));
    }
    read_end = ends[0];
    write_end = ends[1];
    catch_signals();
    // A closed pipe on stdout must not cut off the drain.
    ::signal(SIGPIPE, SIG_IGN);
}

void not_begun(std::optional<std::chrono::milliseconds> limit) {
    begun = false;
    if (!limit) {
        return;
    }
    catch_one(SIGALRM);
    const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(*limit);
    const auto rest = std::chrono::microseconds(*limit - seconds);
    const itimerval once{{}, {seconds.count(), std::max<suseconds_t>(rest.count(), seconds.count() == 0)}};
    ::setitimer(ITIMER_REAL, &once, nullptr);
}

void begin() {
    ::signal(SIGALRM, SIG_IGN); // from here on the limit is a deadline, at which what was gained is kept
    begun = true;
}

void install_removal() {
    if (write_end.load() == -1) {
        catch_signals();
    }
}

bool stop_requested() { return caught.load() != 0; }

std::string reason() {
    switch (caught.load()) {
    case 0:
        return "";
    case SIGINT:
        return "SIGINT";
    case SIGTERM:
        return "SIGTERM";
    default:
        return "SIGHUP";
    }
}

int wake_fd() { return read_end; }

void set_leftovers(const std::string &socket_path, const std::string &directory) {
    leftovers = false;
    if (socket_path.empty() || socket_path.size() >= PATH_MAX || directory.size() >= PATH_MAX) {
        return;
    }
    std::memcpy(socket_buffer, socket_path.c_str(), socket_path.size() + 1);
    std::memcpy(directory_buffer, directory.c_str(), directory.size() + 1);
    leftovers = true;
}

} // namespace qlean::signals
