// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Parsing is strict: a number, one optional suffix, nothing else. A size that cannot be understood is a usage error,
// never a guess.
#include "units.h"

#include <fmt/format.h>

#include <cmath>
#include <cstdlib>

namespace qlean {

namespace {

struct Scaled {
    double value;
    std::string_view suffix;
};

// Splits "1.5G" into 1.5 and "G". Only digits and one point: strtod alone would also take "inf", "nan", "0x1p3", "-1".
std::optional<Scaled> split(std::string_view text) {
    const auto digits = text.find_first_not_of("0123456789.");
    const std::string number(text.substr(0, digits));
    if (number.empty() || number == "." || number.find('.') != number.rfind('.')) {
        return std::nullopt;
    }
    return Scaled{std::strtod(number.c_str(), nullptr),
                  digits == std::string_view::npos ? std::string_view{} : text.substr(digits)};
}

} // namespace

std::string show_bytes(std::uint64_t bytes) {
    return fmt::format("{:.1f} MiB", static_cast<double>(bytes) / 1048576.0);
}

std::string show_bytes(const std::optional<std::uint64_t> &bytes) { return bytes ? show_bytes(*bytes) : "unknown"; }

std::string show_duration(std::chrono::seconds duration) {
    const auto total = duration.count();
    if (total >= 3600) {
        return fmt::format("{}:{:02}:{:02}", total / 3600, total / 60 % 60, total % 60);
    }
    return fmt::format("{}:{:02}", total / 60, total % 60);
}

std::optional<std::uint64_t> parse_size(std::string_view text) {
    const auto parts = split(text);
    if (!parts) {
        return std::nullopt;
    }
    double unit = 1;
    std::string_view suffix = parts->suffix;
    if (!suffix.empty()) {
        switch (suffix.front()) {
        case 'k':
        case 'K':
            unit = 1024.0;
            break;
        case 'm':
        case 'M':
            unit = 1024.0 * 1024;
            break;
        case 'g':
        case 'G':
            unit = 1024.0 * 1024 * 1024;
            break;
        case 't':
        case 'T':
            unit = 1024.0 * 1024 * 1024 * 1024;
            break;
        case 'b':
        case 'B':
            break;
        default:
            return std::nullopt;
        }
        const std::string_view rest = suffix.substr(1);
        const bool plain_bytes = unit == 1;
        if (!rest.empty() && (plain_bytes || (rest != "iB" && rest != "B"))) {
            return std::nullopt;
        }
    }
    const double bytes = parts->value * unit;
    if (bytes < 1 || bytes >= 9.2e18) {
        return std::nullopt;
    }
    return static_cast<std::uint64_t>(std::llround(bytes));
}

std::optional<std::chrono::milliseconds> parse_duration(std::string_view text) {
    const auto parts = split(text);
    if (!parts) {
        return std::nullopt;
    }
    double unit = 0;
    if (parts->suffix.empty() || parts->suffix == "s") {
        unit = 1;
    } else if (parts->suffix == "m") {
        unit = 60;
    } else if (parts->suffix == "h") {
        unit = 3600;
    } else if (parts->suffix == "d") {
        unit = 86400;
    } else {
        return std::nullopt;
    }
    const double milliseconds = parts->value * unit * 1000;
    // A hundred years is surely a typing error, and keeps the clock's arithmetic far from overflow.
    if (milliseconds < 1 || milliseconds > 3.2e12) {
        return std::nullopt;
    }
    return std::chrono::milliseconds(std::llround(milliseconds));
}

} // namespace qlean
