// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "guard.h"

#include "nbdkit.h"

namespace qlean::plugin {

LastError &last_error() {
    static LastError instance;
    return instance;
}

void report_current_exception() {
    int code = EIO;
    std::string text;
    try {
        throw;
    } catch (const Error &error) {
        code = error.errno_value();
        text = error.what();
    } catch (const std::bad_alloc &) {
        code = ENOMEM;
        text = "out of memory";
    } catch (const std::exception &error) {
        text = error.what();
    }
    nbdkit_error("%s", text.c_str());
    nbdkit_set_error(code);
    last_error().set(std::move(text));
}

} // namespace qlean::plugin
