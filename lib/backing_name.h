// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// What the name of a backing file says: which file of the host, and how to read it. Pure: nothing is opened.
//
// Names are read as QEMU reads them. A plain name is relative to the directory of the image that holds it; one with
// `file:` before it, and a file named within `json:`, are relative to the working directory. A name over any other
// protocol is refused by the protocol's name, never taken for a file.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace qlean {

struct BackingName {
    enum class Format {
        qcow2,
        raw,
        probe, ///< nobody said: what the file begins with decides
    };
    enum class Host {
        any,
        file,   ///< a regular file
        device, ///< a block device
    };
    std::string path;
    Format format = Format::probe;
    Host host = Host::any; ///< what the file must be: QEMU's drivers refuse the other
    // Of a raw disk:
    std::uint64_t offset = 0;          ///< where in the file it begins
    std::optional<std::uint64_t> size; ///< its bytes; without it, all to the end of the file

    friend bool operator==(const BackingName &, const BackingName &) = default;
};

/// The backing file `name` of format `format` (both as in the header; the format may be empty) of `image`. Throws Error
/// (unsupported) if it is no file, or of a format that is not read.
BackingName parse_backing_name(const std::string &image, const std::string &name, const std::string &format);

} // namespace qlean
