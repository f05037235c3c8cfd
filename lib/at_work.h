// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Which threads are at work on an image. A signal handler asks: should such a thread abort, what it was working on is
// broken, and must not be written.
#pragma once

#include <csignal>

namespace qlean {

/// How often this thread has begun and not ended. Never allocated on first use: a signal handler could not bear that.
[[gnu::tls_model("initial-exec")]] inline thread_local constinit volatile std::sig_atomic_t at_work = 0;

class AtWork {
  public:
    AtWork() { at_work = at_work + 1; }
    ~AtWork() { at_work = at_work - 1; }
    AtWork(const AtWork &) = delete;
    AtWork &operator=(const AtWork &) = delete;
};

} // namespace qlean
