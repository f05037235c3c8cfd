// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The client's one exception type. It carries the sentence the user reads and the exit code the script reads; only
// main() catches it to end the program. Everything else that unwinds does so through destructors. A server's words may
// be in the sentence, and a terminal must not obey them: it holds no control characters but ends of lines.
#pragma once

#include <stdexcept>
#include <string>

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

class Failure : public std::runtime_error {
  public:
    explicit Failure(const std::string &text, ExitCode code = ExitCode::error)
        : std::runtime_error(printable(text)), code_(code) {}

    ExitCode code() const noexcept { return code_; }

  private:
    static std::string printable(std::string text) {
        for (char &c : text) {
            c = (static_cast<unsigned char>(c) < 0x20 && c != '\n') || c == 0x7f ? '?' : c;
        }
        return text;
    }

    ExitCode code_;
};

} // namespace qlean
