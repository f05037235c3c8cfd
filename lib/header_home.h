// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The header in the file. Every change of it is one write inside the first 512-byte sector, under one mutex, so a
// power cut leaves the old header or the new one. Not synced here: the caller knows what must be durable first.
#pragma once

#include "byte_order.h"
#include "file.h"
#include "header.h"
#include "thread_safety.h"

namespace qlean {

/// The header of the image in `file`, and its first sector as it is. Throws Error if it is none.
inline std::pair<Header, std::vector<std::byte>> read_header(File &file) {
    const std::uint64_t length = file.length();
    std::vector<std::byte> bytes(std::min<std::uint64_t>(length, 4096));
    file.read(bytes, HostOffset{0});
    if (bytes.size() >= 24 && load_be<std::uint32_t>(bytes, 0) == Header::magic) {
        const std::uint64_t cluster = std::uint64_t{1} << std::min(load_be<std::uint32_t>(bytes, 20), 21u);
        if (cluster > bytes.size() && length > bytes.size()) {
            bytes.resize(std::min(cluster, length));
            file.read(bytes, HostOffset{0});
        }
    }
    Header header = Header::parse(bytes, file.name());
    bytes.resize(512);
    return {std::move(header), std::move(bytes)};
}

class HeaderHome {
  public:
    /// `sector`: the first 512 bytes of the file, from which `header` was parsed.
    HeaderHome(File &file, Header header, std::vector<std::byte> sector)
        : file_(file), header_(std::move(header)), sector_(std::move(sector)) {}

    /// A copy: the leader may be changing it.
    Header header() const {
        const Lock guard(mutex_);
        return header_;
    }

    std::uint64_t autoclear() const {
        const Lock guard(mutex_);
        return header_.autoclear;
    }

    /// The first 512 bytes of the file.
    std::vector<std::byte> sector() const {
        const Lock guard(mutex_);
        return sector_;
    }

    /// Applies `change` to the header and writes it; if writing fails, the header is as it was.
    template <class F>
    void update(F &&change) {
        const Lock guard(mutex_);
        Header changed = header_;
        change(changed);
        auto sector = sector_;
        changed.update(sector);
        file_.write(std::span(sector).first(changed.fixed_length()), HostOffset{0});
        header_ = std::move(changed);
        sector_ = std::move(sector);
    }

    /// Writes a big-endian word into the data of an extension that the header has, at byte `within` (a multiple of 8:
    /// extensions are aligned, so it lies in one sector); if writing fails, the header is as it was.
    void set_extension_word(std::uint32_t type, std::uint64_t within, std::uint64_t value) {
        const Lock guard(mutex_);
        for (HeaderExtension &e : header_.extensions)
            if (e.type == type) {
                const std::uint64_t word = big_endian(value);
                file_.write(std::as_bytes(std::span(&word, 1)), HostOffset{e.at + within});
                store_be(std::span(e.data), within, value);
                return;
            }
    }

  private:
    File &file_;
    mutable Mutex mutex_;
    Header header_ PROTECTED_BY(mutex_);
    std::vector<std::byte> sector_ PROTECTED_BY(mutex_);
};

} // namespace qlean
