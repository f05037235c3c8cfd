// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Who may open anything but the guest's disk and the status page: `maintenance=` of the plugin, which the filter heeds
// too. The guest's QEMU need not be the administrator of its disk.
#pragma once

#include <string>
#include <sys/types.h>
#include <vector>

namespace qlean::plugin {

/// The name by which the reclaim filter opens the plugin's disk for giving back; no client may, through the filter, for
/// what it wrote would not be seen.
inline constexpr const char *reclaim_disk = "reclaim/disk";

class Maintainers {
  public:
    /// Everybody who may connect.
    Maintainers() = default;
    /// "yes", "no", or users by name or number, with commas between. Throws std::runtime_error.
    explicit Maintainers(const std::string &text);

    /// Whether who is connected to the calling thread is one of them. False if it is not known who that is, as over
    /// TCP, and it matters.
    bool include_peer() const;
    /// Throws Error (denied) if not.
    void require_peer(const std::string &export_name) const;

  private:
    bool everybody_ = true;
    std::vector<uid_t> users_;
};

} // namespace qlean::plugin
