// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// A judge of QCOW2 images in memory that shares no code with the engine but its big-endian loads: it walks the header,
// the refcount structures and the L1 and L2 tables by the specification and says what 'qemu-img check' would call a
// corruption. The one thing it allows that QEMU does not: refcount 1 with the COPIED flag clear, which is safe.
#pragma once

#include "tests/fault/faulty_file.h"

#include <map>

#include <optional>

namespace qlean::fault {

struct Verdict {
    std::vector<std::string> corruptions;
    std::uint64_t leaks = 0; ///< clusters with more refcounts than referrers

    bool sound() const { return corruptions.empty(); }
    bool clean() const { return sound() && leaks == 0; }
    std::string text() const;
};

/// Judges images without backing file; compressed with deflate.
Verdict judge(std::span<const std::byte> image);

/// The guest's disk as the image says it is, read without the engine.
Bytes guest_bytes(std::span<const std::byte> image);
/// The disk of each snapshot, by name.
using SnapshotDisks = std::map<std::string, Bytes>;
SnapshotDisks snapshot_disks(std::span<const std::byte> image);
/// Nothing, or how the snapshots of `image` differ from these. One of them may be gone.
std::optional<std::string> judge_snapshots(std::span<const std::byte> image, const SnapshotDisks &then);

/// Bitmaps that count, of `image`, which began as `before`: an enabled one that is consistent has a bit for all that
/// differs (granularity 512, as build_image makes them), a disabled one has every byte it had. Nothing, or what is
/// wrong.
std::optional<std::string> judge_bitmaps(std::span<const std::byte> image, std::span<const std::byte> before);
/// There is an enabled bitmap, and it is consistent.
bool has_consistent_bitmap(std::span<const std::byte> image);

/// What qemu-img says of the image.
struct QemuVerdict {
    bool available = false;
    int status = 0; ///< 0 clean, 2 corruptions, 3 leaks only
    std::string output;
};
QemuVerdict ask_qemu(std::span<const std::byte> image);

} // namespace qlean::fault
