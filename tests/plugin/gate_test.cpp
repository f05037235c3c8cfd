// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Who runs beside whom; and how a server ends that aborts: in order where the abort is not our own, and at once where
// it is.
#include "plugin/gate.h"
#include "tests/catch.h"

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <sys/resource.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>
#include <vector>

using qlean::plugin::Gate;

// What of nbdkit the gate needs.
static bool crash_in_shutdown = false;
extern "C" void nbdkit_shutdown() {
    if (crash_in_shutdown)
        std::thread([] { ::raise(SIGSEGV); }).join();
}

namespace {

struct End {
    bool left;  ///< it made everything durable first
    int status; ///< that it exited with, or -1
    int signal; ///< that killed it, or 0
};

/// Of a server that does this, with a way to say that it is ready, once its signals are its own. `sent`: a signal that
/// it gets then.
template <class Do>
End end_of(Do &&what, int sent = 0) {
    int left[2], ready[2];
    REQUIRE(::pipe(left) == 0);
    REQUIRE(::pipe(ready) == 0);
    const pid_t child = ::fork();
    if (child == 0) {
        const rlimit no_core{0, 0};
        ::setrlimit(RLIMIT_CORE, &no_core);
        for (const int signal : {SIGSEGV, SIGABRT, SIGTERM})
            ::signal(signal, SIG_DFL); // Catch's, which nbdkit does not have
        auto *gate = new Gate;
        gate->own_signals([&] { return ::write(left[1], "x", 1) == 1; });
        what(*gate, [&] { [[maybe_unused]] const auto n = ::write(ready[1], "x", 1); });
        for (;;)
            ::pause();
    }
    ::close(left[1]);
    ::close(ready[1]);
    char byte;
    if (sent != 0) {
        CHECK(::read(ready[0], &byte, 1) == 1);
        ::kill(child, sent);
    }
    int status = 0;
    CHECK(::waitpid(child, &status, 0) == child);
    const bool has_left = ::read(left[0], &byte, 1) == 1;
    ::close(left[0]);
    ::close(ready[0]);
    return {has_left, WIFEXITED(status) ? WEXITSTATUS(status) : -1, WIFSIGNALED(status) ? WTERMSIG(status) : 0};
}

} // namespace

TEST_CASE("Who wants to be alone waits for each request in flight, whatever thread runs it, and holds later ones") {
    constexpr int threads = 40; // more than there are doors
    Gate gate;
    for (int last = 0; last < threads; ++last) {
        std::vector<std::thread> requests;
        std::atomic<int> inside{0};
        std::vector<std::atomic<bool>> may_leave(threads);
        for (int i = 0; i < threads; ++i)
            requests.emplace_back([&, i] {
                const auto entry = gate.enter();
                ++inside;
                may_leave[i].wait(false);
                --inside;
            });
        while (inside != threads)
            std::this_thread::yield();
        std::atomic<bool> alone{false}, done{false};
        std::atomic<int> beside{-1};
        std::thread maintainer([&] {
            const auto entry = gate.enter_alone();
            beside = inside.load();
            alone = true;
            done.wait(false);
        });
        const auto let_go = [&](int i) {
            may_leave[i] = true;
            may_leave[i].notify_one();
        };
        for (int i = 0; i < threads; ++i)
            if (i != last)
                let_go(i);
        for (int i = 0; i < threads; ++i)
            if (i != last)
                requests[i].join();
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
        CHECK_FALSE(alone);
        let_go(last);
        requests[last].join();
        while (!alone)
            std::this_thread::yield();
        CHECK(beside == 0);
        std::atomic<int> entered{0};
        std::vector<std::thread> later;
        for (int i = 0; i < threads; ++i)
            later.emplace_back([&] {
                const auto entry = gate.enter();
                ++entered;
            });
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
        CHECK(entered == 0);
        done = true;
        done.notify_one();
        maintainer.join();
        for (auto &thread : later)
            thread.join();
        CHECK(entered == threads);
    }
}

TEST_CASE("An abort of nbdkit's is an end in order") {
    const End end = end_of([](Gate &, auto) { std::thread([] { std::abort(); }).detach(); });
    CHECK(end.left);
    CHECK(end.status == 128 + SIGABRT);
}

TEST_CASE("A crash of nbdkit's after everything was closed is a good end; one before it is a crash") {
    crash_in_shutdown = true;
    const End late = end_of([](Gate &, auto ready) { ready(); }, SIGTERM);
    crash_in_shutdown = false;
    CHECK(late.left);
    CHECK(late.status == 0);
    const End early = end_of([](Gate &, auto) { std::thread([] { ::raise(SIGSEGV); }).detach(); });
    CHECK_FALSE(early.left);
    CHECK(early.signal == SIGSEGV);
}

TEST_CASE("An abort in a request writes nothing more") {
    const End end = end_of([](Gate &gate, auto) {
        std::thread([&] {
            const auto entry = gate.enter();
            std::abort();
        }).detach();
    });
    CHECK_FALSE(end.left);
    CHECK(end.signal == SIGABRT);
    const End alone = end_of([](Gate &gate, auto) {
        const auto entry = gate.enter_alone();
        std::abort();
    });
    CHECK_FALSE(alone.left);
    CHECK(alone.signal == SIGABRT);
}

TEST_CASE("A thread that has left its request aborts like any other") {
    const End end = end_of([](Gate &gate, auto) {
        std::thread([&] {
            { const auto entry = gate.enter(); }
            std::abort();
        }).detach();
    });
    CHECK(end.left);
    CHECK(end.status == 128 + SIGABRT);
}

TEST_CASE("SIGABRT from outside, which any thread may get, lets requests finish") {
    const End end = end_of(
        [](Gate &gate, auto ready) {
            const auto entry = gate.enter();
            ready();
            std::this_thread::sleep_for(std::chrono::milliseconds(300));
        },
        SIGABRT);
    CHECK(end.left);
    CHECK(end.status == 128 + SIGABRT);
}
