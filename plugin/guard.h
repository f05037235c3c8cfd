// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The C boundary: no exception crosses it. An error becomes a line in the server's log, an errno for the client, and
// the `last_error` of the status page, which counts them.
#pragma once

#include "lib/error.h"
#include "lib/thread_safety.h"

#include <cstdint>
#include <optional>
#include <string>

namespace qlean::plugin {

class LastError {
  public:
    struct Told {
        std::optional<std::string> last;
        std::uint64_t count = 0; ///< since the server was started
    };

    void set(std::string text) {
        const Lock guard(mutex_);
        told_ = {std::move(text), told_.count + 1};
    }
    Told get() const {
        const Lock guard(mutex_);
        return told_;
    }

  private:
    mutable Mutex mutex_;
    Told told_ PROTECTED_BY(mutex_);
};

LastError &last_error();

/// Reports the exception being handled.
void report_current_exception();

/// Runs `f`; if it throws, reports and returns `failed`.
template <class F, class R>
R guarded(R failed, F &&f) {
    try {
        return f();
    } catch (...) {
        report_current_exception();
        return failed;
    }
}

} // namespace qlean::plugin
