// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// nbdkit's plugin interface, included the one right way.
#pragma once

#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>
