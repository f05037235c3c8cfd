// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// How long work is told to stop.
#pragma once

#include "error.h"

#include <functional>

namespace qlean {

/// Asked between steps of long work: true means stop now.
using StopCheck = std::function<bool()>;
inline const StopCheck never = [] { return false; };

inline void require_going(const StopCheck &stop) {
    if (stop())
        throw Error(Error::Kind::stopped, ESHUTDOWN, "stopped on request");
}

} // namespace qlean
