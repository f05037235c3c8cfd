// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// A host file in memory for one thread. It may claim any length, as a file with holes does; what is stored of it is at
// most `most_bytes`, behind which the host is full.
#pragma once

#include "lib/error.h"
#include "lib/file.h"

#include <memory>
#include <vector>

namespace qlean::fuzz {

struct MemoryDisk {
    static constexpr std::uint64_t most_bytes = 4 * 1024 * 1024;

    std::vector<std::byte> bytes; ///< from the beginning; zeroes follow up to `length`
    std::uint64_t length = 0;

    explicit MemoryDisk(std::vector<std::byte> content) : bytes(std::move(content)), length(bytes.size()) {}
};

class MemoryFile : public File {
  public:
    explicit MemoryFile(std::shared_ptr<MemoryDisk> disk) : disk_(std::move(disk)) {}

    void read(std::span<std::byte> into, HostOffset at) override {
        std::fill(into.begin(), into.end(), std::byte{0});
        const auto &bytes = disk_->bytes;
        if (at.value >= bytes.size())
            return;
        const auto there = std::min<std::uint64_t>(into.size(), bytes.size() - at.value);
        std::copy_n(bytes.begin() + static_cast<std::ptrdiff_t>(at.value), there, into.begin());
    }
    bool read_cached(std::span<std::byte> into, HostOffset at) override {
        read(into, at);
        return true;
    }
    void write(std::span<const std::byte> from, HostOffset at) override {
        if (from.empty())
            return;
        if (from.size() > MemoryDisk::most_bytes || at.value > MemoryDisk::most_bytes - from.size())
            throw_io(ENOSPC, "the file in memory is full");
        auto &bytes = disk_->bytes;
        if (bytes.size() < at.value + from.size())
            bytes.resize(at.value + from.size());
        std::copy(from.begin(), from.end(), bytes.begin() + static_cast<std::ptrdiff_t>(at.value));
        disk_->length = std::max<std::uint64_t>(disk_->length, at.value + from.size());
    }
    void sync() override {}
    void truncate(std::uint64_t length) override {
        if (length > std::max(disk_->length, MemoryDisk::most_bytes))
            throw_io(ENOSPC, "the file in memory is full");
        disk_->bytes.resize(std::min<std::uint64_t>(disk_->bytes.size(), length));
        disk_->length = length;
    }
    bool punch(HostOffset at, std::uint64_t length) override {
        auto &bytes = disk_->bytes;
        if (at.value < bytes.size())
            std::fill_n(bytes.begin() + static_cast<std::ptrdiff_t>(at.value),
                        std::min<std::uint64_t>(length, bytes.size() - at.value), std::byte{0});
        return true;
    }
    bool zero_keeping_space(HostOffset at, std::uint64_t length) override { return punch(at, length); }
    void reserve_space(HostOffset, std::uint64_t) override {}
    std::uint64_t length() override { return disk_->length; }
    std::uint64_t allocated() override { return disk_->bytes.size(); }
    std::optional<HostOffset> next_data(HostOffset at) override {
        return at.value < disk_->bytes.size() ? std::optional(at) : std::nullopt;
    }
    HostOffset next_hole(HostOffset) override { return {disk_->bytes.size()}; }
    void will_need(HostOffset, std::uint64_t) override {}
    void start_writing_out(HostOffset, std::uint64_t) override {}
    const std::string &name() const override { return name_; }

  private:
    std::shared_ptr<MemoryDisk> disk_;
    std::string name_ = "fuzzed.qcow2";
};

} // namespace qlean::fuzz
