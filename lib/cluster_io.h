// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Walking a byte range cluster by cluster, and joining what is adjacent in memory and in the file into one request.
#pragma once

#include "address.h"

#include <span>

namespace qlean {

/// Calls f(first byte within the request, guest cluster, offset in cluster, bytes) for each cluster of a range.
template <class F>
void each_cluster(const Geometry &geometry, GuestOffset at, std::uint64_t length, F &&f) {
    for (std::uint64_t done = 0; done < length;) {
        const std::uint64_t within = geometry.within(at + done);
        const std::uint64_t n = std::min(length - done, geometry.cluster_size() - within);
        f(done, geometry.cluster_of(at + done), within, n);
        done += n;
    }
}

/// Bytes of memory for adjacent bytes of the file (or of another disk), joined as they are added, done when the next
/// does not fit.
template <class Byte, class Offset, class Io>
class Joined {
  public:
    explicit Joined(Io io) : io_(std::move(io)) {}
    void add(std::span<Byte> bytes, Offset at) {
        if (!bytes_.empty() && bytes_.data() + bytes_.size() == bytes.data() && at_ + bytes_.size() == at) {
            bytes_ = {bytes_.data(), bytes_.size() + bytes.size()};
            return;
        }
        finish();
        bytes_ = bytes;
        at_ = at;
    }
    void finish() {
        if (!bytes_.empty())
            io_(bytes_, at_);
        bytes_ = {};
    }

  private:
    Io io_;
    std::span<Byte> bytes_;
    Offset at_;
};

template <class Byte, class Offset = HostOffset, class Io>
Joined<Byte, Offset, Io> joined(Io io) {
    return Joined<Byte, Offset, Io>(std::move(io));
}

} // namespace qlean
