// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Whoever uses an image in memory: a guest and maintenance, one request after another. Errors of a sound image (Trust::
// all) go through to the caller, and each byte read is compared with a model; of any other image errors are as good as
// answers, and only what ends the process is wrong.
#pragma once

#include "lib/compact/maintenance.h"
#include "tests/fuzz/image_cases.h"
#include "tests/fuzz/input.h"
#include "tests/fuzz/memory_file.h"

namespace qlean::fuzz {

class ImageUser {
  public:
    enum class Trust { none, all };
    ImageUser(std::shared_ptr<MemoryDisk> disk, const ImageCase &from, Trust trust);

    /// `how`: read-only, or to be repaired.
    void open(std::uint64_t how);
    /// One request, chosen by the input.
    void operate(Input &in);
    void close();

  private:
    void guest_request(std::uint64_t which, Input &in);
    void maintain(std::uint64_t which, Input &in);
    void read(std::uint64_t at, std::uint64_t length);
    void write(std::uint64_t at, std::uint64_t length, unsigned value);
    /// Each byte of the range reads as it was, or as zero.
    void trimmed(std::uint64_t at, std::uint64_t length);
    void run(Maintenance &operation, std::uint64_t at, std::uint64_t length);
    void look_at_snapshots(std::uint64_t at, std::uint64_t length);
    void delete_snapshot(std::uint64_t which);
    std::unique_ptr<File> data_file() const;

    const std::shared_ptr<MemoryDisk> disk_, data_;
    const Trust trust_;
    Bytes model_;
    std::unique_ptr<Image> image_;
    MoveOwnership ownership_;
    Gauges gauges_;
    std::uint64_t connections_ = 0;
};

} // namespace qlean::fuzz
