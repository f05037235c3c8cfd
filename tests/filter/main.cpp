// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The main program of the filter's unit tests, and stand-ins for what nbdkit provides to a loaded filter.

#define CATCH_CONFIG_RUNNER
#include "tests/catch.h"

extern "C" void nbdkit_debug(const char *, ...) {}

int main(int argc, char **argv) { return Catch::Session().run(argc, argv); }
