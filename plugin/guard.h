// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The C boundary: no exception crosses it. An error becomes a line in the server's log, an errno for the client, and
// the `last_error` of the status page.
#pragma once

#include "lib/error.h"
#include "lib/thread_safety.h"

#include <optional>
#include <string>

namespace qlean::plugin {

class LastError {
  public:
    void set(std::string text) {
        const Lock guard(mutex_);
        text_ = std::move(text);
    }
    std::optional<std::string> get() const {
        const Lock guard(mutex_);
        return text_;
    }

  private:
    mutable Mutex mutex_;
    std::optional<std::string> text_ PROTECTED_BY(mutex_);
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
