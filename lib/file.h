// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The host file under an image, as an interface: the seam at which tests inject faults and power cuts.
// Offsets and lengths are bytes. Every operation is safe to call from several threads at once and throws Error.
#pragma once

#include "address.h"

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace qlean {

/// Below this a hole in the host file frees nothing.
constexpr std::uint64_t host_block = 4096;

/// A file of the host, by whatever name.
struct FileIdentity {
    std::uint64_t device, inode;

    friend bool operator==(const FileIdentity &, const FileIdentity &) = default;
};

class File {
  public:
    virtual ~File() = default;

    /// Reads exactly into.size() bytes; what lies beyond the end of the file reads as zeroes.
    virtual void read(std::span<std::byte> into, HostOffset at) = 0;
    /// As read, but only if no device has to be waited for; false (and `into` undefined) otherwise.
    virtual bool read_cached(std::span<std::byte> into, HostOffset at) = 0;
    virtual void write(std::span<const std::byte> from, HostOffset at) = 0;
    /// Makes everything that was written before the call durable.
    virtual void sync() = 0;
    virtual void truncate(std::uint64_t length) = 0;
    /// Gives [at, at+length) back to the host, reading as zeroes after. False: not possible, nothing changed.
    virtual bool punch(HostOffset at, std::uint64_t length) = 0;
    /// Makes [at, at+length) read as zeroes and keeps the space. False: not possible cheaply, nothing changed.
    virtual bool zero_keeping_space(HostOffset at, std::uint64_t length) = 0;
    /// Makes the host keep space for [at, at+length), so that writing there cannot run out of it. Where the host has no
    /// such promise, nothing happens.
    virtual void reserve_space(HostOffset at, std::uint64_t length) = 0;
    /// Makes [to, to+length) hold what [from, from+length) holds, by sharing the host's blocks: nothing is read or
    /// written. False: the host's file system cannot, nothing changed. After an error anything may be at `to`.
    virtual bool share(HostOffset from, HostOffset to, std::uint64_t length) {
        static_cast<void>(from), static_cast<void>(to), static_cast<void>(length);
        return false;
    }
    /// A hint before share() of that, which has to write out first what is dirty there.
    virtual void prepare_to_share(HostOffset at, std::uint64_t length) {
        static_cast<void>(at), static_cast<void>(length);
    }
    /// A hole, and what was never written below the end of the file, reads as zeroes.
    virtual bool holes_are_zeroes() const { return true; }
    virtual std::uint64_t length() = 0;
    /// Bytes the host has allocated for the file.
    virtual std::uint64_t allocated() = 0;
    /// The first byte at or after `at` that may hold data; nothing if only a hole follows.
    virtual std::optional<HostOffset> next_data(HostOffset at) = 0;
    /// The first byte after `at`, which may hold data, that does not; at most the length.
    virtual HostOffset next_hole(HostOffset) { return {length()}; }
    /// Hints; they may do nothing.
    virtual void will_need(HostOffset at, std::uint64_t length) = 0;
    virtual void start_writing_out(HostOffset at, std::uint64_t length) = 0;
    /// The name for messages.
    virtual const std::string &name() const = 0;
    /// Which file this is, where it is one of the host.
    virtual std::optional<FileIdentity> identity() const { return std::nullopt; }

    /// As punch, as a hint: what cannot be given back stays as it is.
    void punch_if_possible(HostOffset at, std::uint64_t length);
    /// The guest's disk grows: for a file that holds it at its own offsets. What is new reads as zeroes.
    virtual void grow_disk(std::uint64_t from, std::uint64_t to) {
        static_cast<void>(from);
        static_cast<void>(to);
    }

    /// Writes zeroes the slow way.
    void write_zeroes(HostOffset at, std::uint64_t length);
};

/// Numbers the syncs of an image, so that "durable" can be asserted instead of believed. Where the guest's data has a
/// file of its own, a sync covers that first.
///
/// A write is covered only by a sync that *started* after the write returned; needs() taken after a write is the
/// number of the first such sync. Only the commit leader calls sync(); the other members may be called by anybody.
class SyncLog {
  public:
    explicit SyncLog(File &file) : SyncLog(file, file) {}
    SyncLog(File &file, File &data) : file_(file), data_(data) {}

    /// The first sync that covers everything written before this call.
    std::uint64_t needs() const { return started_.load(std::memory_order_seq_cst) + 1; }
    bool is_durable(std::uint64_t needs) const { return completed_.load(std::memory_order_acquire) >= needs; }
    std::uint64_t completed() const { return completed_.load(std::memory_order_acquire); }

    void sync() {
        const auto number = started_.fetch_add(1, std::memory_order_seq_cst) + 1;
        if (&data_ != &file_)
            data_.sync();
        file_.sync();
        completed_.store(number, std::memory_order_release);
    }

  private:
    File &file_;
    File &data_;
    std::atomic<std::uint64_t> started_{0};
    std::atomic<std::uint64_t> completed_{0};
};

} // namespace qlean
