// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// A regular file of the host, or a block device that is only read. Owns the descriptor, and with it the image locks
// that were taken on it.
#pragma once

#include "file.h"

#include <memory>

namespace qlean {

class PosixFile final : public File {
  public:
    enum class Access { read_only, read_write };

    enum class Devices { refused, accepted };

    /// Opens an existing regular file, or, for reading, a block device. Throws Error that names the file and the
    /// reason.
    static std::unique_ptr<PosixFile> open(const std::string &path, Access access, Devices devices = Devices::refused);
    /// Creates a new file; fails if one exists.
    static std::unique_ptr<PosixFile> create(const std::string &path);
    ~PosixFile() override;
    PosixFile(const PosixFile &) = delete;
    PosixFile &operator=(const PosixFile &) = delete;

    void read(std::span<std::byte> into, HostOffset at) override;
    bool read_cached(std::span<std::byte> into, HostOffset at) override;
    void write(std::span<const std::byte> from, HostOffset at) override;
    void sync() override;
    void truncate(std::uint64_t length) override;
    bool punch(HostOffset at, std::uint64_t length) override;
    bool zero_keeping_space(HostOffset at, std::uint64_t length) override;
    void reserve_space(HostOffset at, std::uint64_t length) override;
    bool share(HostOffset from, HostOffset to, std::uint64_t length) override;
    void prepare_to_share(HostOffset at, std::uint64_t length) override;
    std::uint64_t length() override;
    std::uint64_t allocated() override;
    std::optional<HostOffset> next_data(HostOffset at) override;
    HostOffset next_hole(HostOffset at) override;
    void will_need(HostOffset at, std::uint64_t length) override;
    void start_writing_out(HostOffset at, std::uint64_t length) override;
    const std::string &name() const override { return path_; }
    std::optional<FileIdentity> identity() const override { return identity_; }

    int descriptor() const { return fd_; }
    bool is_device() const { return is_device_; }
    /// To be called before anything is concluded from what the file says and then written. A server that was killed
    /// leaves writes that nobody has made durable: this makes them so. After a sync of this file that failed, the page
    /// cache shows what the device never got: it is forgotten.
    void agree_with_device();
    /// Remembers, or asks, whether a sync of this file failed while its pages may still be cached.
    void remember_failed_sync(bool failed);
    bool had_failed_sync() const;

  private:
    PosixFile(int fd, std::string path) : fd_(fd), path_(std::move(path)) {}
    bool may_share(HostOffset at, std::uint64_t length) const;
    void distrust_page_cache();
    [[noreturn]] void fail_to_sync(int code, const char *how);
    [[noreturn]] void fail(int code, const char *what, HostOffset at, std::uint64_t length) const;

    int fd_;
    std::string path_;
    std::optional<FileIdentity> identity_;
    bool is_device_ = false;
    std::atomic<bool> can_punch_{true};
    std::atomic<bool> can_zero_{true};
    std::atomic<bool> can_share_{false};
};

} // namespace qlean
