// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// An external data file (docs/interop/qcow2, "External data file bit"): the guest's clusters are in a file of their
// own, each at its guest offset, and the image holds metadata only. Nothing there is allocated, counted or moved:
// entries hold no references, COPIED is always set, and what is unmapped is punched at once.
//
// The invariant: no byte beyond the end of the guest's disk is written, so with "data_file_raw" the file is the disk.
#pragma once

#include "file.h"
#include "header.h"
#include "posix_file.h"

#include <atomic>
#include <memory>

namespace qlean {

/// Throws Error if the header says things about a data file that cannot be.
void require_sane_data_file(const Header &header, const std::string &image);

/// Where the data file of the image at `path` is: `chosen`, or what the header names, which QEMU takes from the current
/// directory if it is relative, and everybody else from the image's. Throws Error if it is in neither, or another file
/// in each.
std::string find_data_file(const Header &header, const std::string &path, const std::string &chosen);

/// Opens and locks (as QEMU does) the data file of `image`.
std::unique_ptr<PosixFile> open_data_file(const Header &header, const PosixFile &image, const std::string &chosen,
                                          PosixFile::Access access);

class DataFile final : public File {
  public:
    /// Throws Error if `file` should be the disk (raw) and is shorter.
    DataFile(std::unique_ptr<File> file, const Header &header, const std::string &image);

    void write(std::span<const std::byte> from, HostOffset at) override;
    bool punch(HostOffset at, std::uint64_t length) override;
    bool zero_keeping_space(HostOffset at, std::uint64_t length) override;
    void truncate(std::uint64_t length) override;
    void reserve_space(HostOffset at, std::uint64_t length) override;
    void grow_disk(std::uint64_t from, std::uint64_t to) override;

    void read(std::span<std::byte> into, HostOffset at) override { file_->read(into, at); }
    bool read_cached(std::span<std::byte> into, HostOffset at) override { return file_->read_cached(into, at); }
    void sync() override { file_->sync(); }
    std::uint64_t length() override { return file_->length(); }
    std::uint64_t allocated() override { return file_->allocated(); }
    std::optional<HostOffset> next_data(HostOffset at) override { return file_->next_data(at); }
    void will_need(HostOffset at, std::uint64_t length) override { file_->will_need(at, length); }
    void start_writing_out(HostOffset at, std::uint64_t length) override { file_->start_writing_out(at, length); }
    const std::string &name() const override { return file_->name(); }

  private:
    std::uint64_t inside(HostOffset at, std::uint64_t length) const;

    const std::unique_ptr<File> file_;
    std::atomic<std::uint64_t> disk_size_;
};

} // namespace qlean
