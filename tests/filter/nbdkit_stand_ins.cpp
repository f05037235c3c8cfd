// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// What nbdkit provides to a loaded filter, for tests of its parts without nbdkit.

extern "C" void nbdkit_debug(const char *, ...) {}
