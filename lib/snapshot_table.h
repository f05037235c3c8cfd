// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The table of internal snapshots (docs/interop/qcow2, "Snapshots"): bytes to entries and back. Pure: no I/O.
//
// Nothing of an entry is lost on the way: extra data that is not understood goes back as it came, so a table that is
// decoded and encoded differs in nothing that any program could look at. Offsets that decode() returns are only known
// to be aligned and in range, not to point at anything sensible.
#pragma once

#include "address.h"

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace qlean {

struct SnapshotEntry {
    HostOffset l1_offset;
    std::uint32_t l1_size = 0; ///< entries
    std::string id, name;
    std::uint32_t date_sec = 0, date_nsec = 0;
    std::uint64_t vm_clock_nsec = 0;
    std::uint32_t vm_state_size_32 = 0; ///< as stored; see vm_state_size()
    std::vector<std::byte> extra;       ///< all of the extra data

    /// Bytes of VM state, which the snapshot's L1 table maps beyond its disk.
    std::uint64_t vm_state_size() const;
    /// Size of the disk when the snapshot was taken; old tables do not say, and mean that of the image.
    std::uint64_t disk_size(std::uint64_t of_image) const;

    friend bool operator==(const SnapshotEntry &, const SnapshotEntry &) = default;
};

struct SnapshotTable {
    static constexpr std::uint32_t max_snapshots = 65536;
    /// QEMU refuses more than this.
    static constexpr std::uint64_t max_bytes = std::uint64_t{64} * 1024 * 1024;
    static constexpr std::uint64_t max_extra_bytes = 1024;
    /// Of an entry, before its extra data, its id and its name.
    static constexpr std::size_t fixed_bytes = 40;
    /// With what may lie before it, so that it is aligned.
    static constexpr std::uint64_t longest_entry = 8 + fixed_bytes + max_extra_bytes + 2 * 65535;
    static constexpr std::uint64_t max_l1_bytes = std::uint64_t{32} * 1024 * 1024;

    std::vector<SnapshotEntry> entries;

    /// Decodes the table of `count` snapshots that begins at the start of `bytes`, which may hold more than the table.
    /// Throws Error naming `file`. `length`: set to the bytes of the table; also if it throws, to those of the
    /// entries before the one that it names.
    static SnapshotTable decode(std::span<const std::byte> bytes, std::uint32_t count, const Geometry &geometry,
                                const std::string &file, std::uint64_t *length);
    std::vector<std::byte> encode() const;
    /// Where each entry begins in what encode() gives; its first word is the address of its L1 table.
    std::vector<std::uint64_t> positions() const;
};

} // namespace qlean
