// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// A fuzzer's input as a stream of choices. When it has come to its end, every choice is 0: each input means something.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <span>
#include <string>

namespace qlean::fuzz {

class Input {
  public:
    Input(const std::uint8_t *data, std::size_t size) : left_(std::as_bytes(std::span(data, size))) {}

    bool empty() const { return left_.empty(); }
    std::uint64_t number(unsigned bytes) {
        std::uint64_t value = 0;
        for (unsigned i = 0; i < bytes && !left_.empty(); ++i, left_ = left_.subspan(1))
            value |= std::to_integer<std::uint64_t>(left_.front()) << 8 * i;
        return value;
    }
    std::uint64_t byte() { return number(1); }
    /// Less than `end`; 0 if that is 0.
    std::uint64_t below(std::uint64_t end, unsigned bytes = 1) { return end == 0 ? 0 : number(bytes) % end; }
    std::span<const std::byte> take(std::size_t length) {
        const auto taken = left_.first(std::min(length, left_.size()));
        left_ = left_.subspan(taken.size());
        return taken;
    }
    std::span<const std::byte> rest() { return take(left_.size()); }
    std::string text() {
        const auto bytes = rest();
        return {reinterpret_cast<const char *>(bytes.data()), bytes.size()};
    }

  private:
    std::span<const std::byte> left_;
};

/// What must never be: ends the process, and the fuzzer keeps the input.
[[noreturn]] inline void wrong(const std::string &what) {
    std::fprintf(stderr, "WRONG: %s\n", what.c_str());
    std::abort();
}

inline void require(bool holds, const char *what) {
    if (!holds)
        wrong(what);
}

} // namespace qlean::fuzz
