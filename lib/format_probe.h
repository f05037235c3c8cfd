// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Guessing the format of a disk image from how it begins, for backing files whose format nobody wrote down. It guesses
// as QEMU does, so that both see the same disk: a format that QEMU would recognize is never taken for raw.
#pragma once

#include <cstddef>
#include <span>
#include <string>

namespace qlean {

/// Bytes of the beginning that decide.
constexpr std::size_t format_probe_bytes = 512;

/// QEMU's name of the format; "raw" for what is no other. `head`: the first bytes of `path`, fewer if it is shorter.
std::string probe_format(std::span<const std::byte> head, const std::string &path);

} // namespace qlean
