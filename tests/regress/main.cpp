// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The main program of the regression tests. Each test is named after the bug in somebody else's software that it stands
// for, and makes the sequence of events that lost data there. None of these bugs was ever one of ours, as far as known.
#define CATCH_CONFIG_RUNNER
#include "tests/catch.h"

int main(int argc, char **argv) { return Catch::Session().run(argc, argv); }
