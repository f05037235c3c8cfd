// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The exports through which the guest's disk may change: the default export, which is watched, and every other one the
// plugin offers, which isn't but may be the same disk under another name (plugins that know only one disk serve it
// under any name). A change through another name is never recorded; it only makes the record forget.

#pragma once

#include "filter/export.h"
#include "filter/watcher.h"

namespace qlean {

/// What the plugin lets this connection do with its disk. Also primes nbdkit's cache of the answers, without which
/// requests the client didn't cause would be refused.
InnerDisk inspect(nbdkit_next *next);

class OtherExport : public Export {
  public:
    /// watcher: null if nothing is watched.
    explicit OtherExport(Watcher *watcher) : watcher_(watcher) {}

    int pwrite(nbdkit_next *next, const void *buffer, std::uint32_t count, std::uint64_t offset, std::uint32_t flags,
               int *err) override;
    int trim(nbdkit_next *next, std::uint32_t count, std::uint64_t offset, std::uint32_t flags, int *err) override;
    int zero(nbdkit_next *next, std::uint32_t count, std::uint64_t offset, std::uint32_t flags, int *err) override;

  protected:
    Watcher *watcher_;
};

class DiskExport : public OtherExport {
  public:
    using OtherExport::OtherExport;

    int prepare(nbdkit_next *next) override;
    int pwrite(nbdkit_next *next, const void *buffer, std::uint32_t count, std::uint64_t offset, std::uint32_t flags,
               int *err) override;
    int trim(nbdkit_next *next, std::uint32_t count, std::uint64_t offset, std::uint32_t flags, int *err) override;
    int zero(nbdkit_next *next, std::uint32_t count, std::uint64_t offset, std::uint32_t flags, int *err) override;

  private:
    InnerDisk disk_;
    bool watched_ = false;
};

} // namespace qlean
