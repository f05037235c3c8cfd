// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The one exception of the library. Its text is a whole sentence for a person: what, where, and what to do next.
// Its code is an errno value, which is all that survives on the wire. What an image or a client calls something may be
// in it, and it goes to logs and terminals: it holds no control characters.
#pragma once

#include <cerrno>
#include <fmt/format.h>
#include <string>
#include <system_error>

namespace qlean {

class Error : public std::system_error {
  public:
    enum class Kind {
        io,          ///< the host refused an operation
        bad_image,   ///< the file is not a QCOW2 image, or a damaged one
        unsupported, ///< a valid image that uses what we do not handle
        busy,        ///< somebody else holds what is needed
        denied,      ///< not allowed here (read-only image, poisoned image)
        no_space,    ///< the host's file system is full
        stopped,     ///< the caller asked to stop
    };

    Error(Kind kind, int code, std::string text)
        : std::system_error(code, std::generic_category()), kind_(kind), text_(printable(std::move(text))) {}

    Kind kind() const { return kind_; }
    int errno_value() const { return code().value(); }
    const char *what() const noexcept override { return text_.c_str(); }

  private:
    static std::string printable(std::string text) {
        for (char &c : text)
            if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f)
                c = '?';
        return text;
    }

    Kind kind_;
    std::string text_;
};

/// An operation of the host failed with `code`; the text names `what` and the reason.
[[noreturn]] inline void throw_io(int code, const std::string &what) {
    const auto kind = code == ENOSPC || code == EDQUOT ? Error::Kind::no_space : Error::Kind::io;
    throw Error(kind, code == EDQUOT ? ENOSPC : code,
                fmt::format("{}: {}", what, std::generic_category().message(code)));
}

/// The image contradicts itself.
template <class... Args>
[[noreturn]] void throw_bad_image(fmt::format_string<Args...> text, Args &&...args) {
    throw Error(Error::Kind::bad_image, EIO, fmt::format(text, std::forward<Args>(args)...));
}

} // namespace qlean
