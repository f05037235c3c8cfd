// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#define CATCH_CONFIG_RUNNER
#include "tests/catch.h"

int main(int argc, char **argv) { return Catch::Session().run(argc, argv); }
