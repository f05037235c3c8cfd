// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// What nearly every test of the engine includes, compiled once for each program. Owns nothing: files include what they
// need themselves.
#ifndef QLEAN_TESTS_PCH_H
#define QLEAN_TESTS_PCH_H

#include "tests/catch.h"
#include "tests/fault/scene.h"

#endif
