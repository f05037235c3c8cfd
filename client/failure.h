// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// What went wrong, and how the user is told. Failure is the client's one exception type: it carries the sentence the
// user reads and the exit code the script reads; only main() catches it to end the program. Everything else that
// unwinds does so through destructors. A server's words may be in the sentence, and a terminal must not obey them: it
// holds no control characters but ends of lines.
#pragma once

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>

namespace qlean {

// The numbers are documented in qlean.pod; scripts depend on them.
enum class ExitCode : int {
    done = 0,
    error = 1,
    usage = 2,
    stopped = 3,
    busy = 4,
    server_gone = 5,
    // `check` speaks as qemu-img check does.
    corruptions = 2,
    leaks = 3,
};

// With `?` for each control character that is not one of `kept`.
inline std::string printable(std::string text, std::string_view kept = {}) {
    for (char &c : text) {
        const bool control = static_cast<unsigned char>(c) < 0x20 || c == 0x7f;
        c = control && kept.find(c) == kept.npos ? '?' : c;
    }
    return text;
}

// On standard error; what nobody can be told must not end the program.
inline void tell(const std::string &sentence) noexcept {
    std::fputs(sentence.c_str(), stderr);
    std::fputc('\n', stderr);
}

class Failure : public std::runtime_error {
  public:
    explicit Failure(const std::string &text, ExitCode code = ExitCode::error)
        : std::runtime_error(printable(text, "\n")), code_(code) {}

    ExitCode code() const noexcept { return code_; }

  private:
    ExitCode code_;
};

// A result that could not be written is no result: a full disk must not look like success.
inline void flush_output() {
    if (std::fflush(stdout) != 0) {
        throw Failure(std::string("cannot write to standard output: ") + std::strerror(errno));
    }
}

} // namespace qlean
