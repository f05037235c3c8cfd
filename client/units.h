// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The only place where numbers become text for people, and where sizes and durations typed by people become numbers.
// People see MiB with one decimal everywhere; JSON carries exact bytes and never passes through here.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace qlean {

constexpr std::uint64_t mebibyte = 1048576; // bytes

// "5120.0 MiB"
std::string show_bytes(std::uint64_t bytes);

// The same, or "unknown" when the server did not say.
std::string show_bytes(const std::optional<std::uint64_t> &bytes);

// "1:02:03" or "0:07"
std::string show_duration(std::chrono::seconds duration);

// "10M", "1.5G", "512K", "4096", "10MiB": binary multiples. Nothing on garbage, zero or overflow.
std::optional<std::uint64_t> parse_size(std::string_view text);

// "90", "90s", "15m", "1.5h", "2d". Nothing on garbage, zero or overflow.
std::optional<std::chrono::milliseconds> parse_duration(std::string_view text);

} // namespace qlean
