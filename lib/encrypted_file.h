// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The guest's clusters in an encrypted image: a File that encrypts what is written to the file below it and decrypts
// what is read. The vector of a sector is its place in the image file, so a cluster that is copied through here from
// one place to another is encrypted anew.
//
// The invariant: a sector changes as a whole. Requests of any alignment are allowed; a write of part of a sector reads
// the rest, holding the sector exclusively, so writers side by side in one sector lose nothing of each other and a
// reader never decrypts half of each. This lock is a leaf: nothing else is taken under it.
//
// Nothing is free here: a hole decrypts to noise, so it is never zeroes, and zeroing means writing.
#pragma once

#include "file.h"
#include "range_lock.h"
#include "sector_cipher.h"

#include <memory>

namespace qlean {

class EncryptedFile final : public File {
  public:
    /// Over the image file itself, which is somebody else's, and synced by them.
    EncryptedFile(File &below, SectorCipher cipher);
    /// Over a data file.
    EncryptedFile(std::unique_ptr<File> below, SectorCipher cipher);

    void read(std::span<std::byte> into, HostOffset at) override;
    bool read_cached(std::span<std::byte> into, HostOffset at) override;
    void write(std::span<const std::byte> from, HostOffset at) override;
    bool punch(HostOffset, std::uint64_t) override { return false; }
    bool zero_keeping_space(HostOffset, std::uint64_t) override { return false; }
    std::optional<HostOffset> next_data(HostOffset at) override { return at; }
    bool holes_are_zeroes() const override { return false; }

    void sync() override {
        if (owned_)
            owned_->sync();
    }
    void truncate(std::uint64_t length) override { below_.truncate(length); }
    void reserve_space(HostOffset at, std::uint64_t length) override { below_.reserve_space(at, length); }
    void grow_disk(std::uint64_t from, std::uint64_t to) override { below_.grow_disk(from, to); }
    std::uint64_t length() override { return below_.length(); }
    std::uint64_t allocated() override { return below_.allocated(); }
    void will_need(HostOffset at, std::uint64_t length) override { below_.will_need(at, length); }
    void start_writing_out(HostOffset at, std::uint64_t length) override { below_.start_writing_out(at, length); }
    const std::string &name() const override { return below_.name(); }

  private:
    template <class ReadBelow>
    bool read_with(std::span<std::byte> into, HostOffset at, ReadBelow &&read_below);
    void write_sectors(std::span<const std::byte> from, HostOffset at);

    const std::unique_ptr<File> owned_;
    File &below_;
    SectorCipher cipher_;
    RangeLock sectors_;
};

} // namespace qlean
