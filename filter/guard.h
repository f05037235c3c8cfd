// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The C boundary: an exception must never cross into nbdkit. What a callback throws becomes one line in the server's
// log and an errno that survives the wire.

#pragma once

#include <cerrno>
#include <exception>
#include <new>

#include <nbdkit-filter.h>

namespace qlean {

/// Runs f; if it throws, logs why and returns failure, with *err (if there is one) set.
template <typename R, typename F>
R guard(R failure, int *err, F &&f) noexcept {
    try {
        return f();
    } catch (const std::bad_alloc &) {
        nbdkit_error("reclaim: out of memory; give the server more or lower reclaim-memory");
        errno = ENOMEM;
    } catch (const std::exception &e) {
        nbdkit_error("reclaim: %s", e.what());
        errno = EIO;
    } catch (...) {
        nbdkit_error("reclaim: unknown failure inside the filter");
        errno = EIO;
    }
    if (err)
        *err = errno;
    return failure;
}

} // namespace qlean
