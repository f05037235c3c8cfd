// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// What nearly every file of the engine includes, compiled once in builds with a sanitizer, which are made anew in every
// run of the tests. Owns nothing: files include what they need themselves, and the ordinary build does not see this.

#ifndef QLEAN_COMMON_H
#define QLEAN_COMMON_H

#include "lib/state.h"

#include <fmt/format.h>
#include <functional>
#include <map>

#endif
