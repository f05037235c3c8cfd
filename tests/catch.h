// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Catch2 under one name: Debian 12 has version 2, Debian 13 version 3.

#pragma once

#if __has_include(<catch2/catch_all.hpp>)
#include <catch2/catch_all.hpp>
#define QLEAN_CATCH2_VERSION 3
#else
#include <catch2/catch.hpp>
#define QLEAN_CATCH2_VERSION 2
#endif
