// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// A host file in memory that fails, remembers and stops on request. FaultyDisk is what survives the image that uses
// it: the bytes, the record of every change and sync in the order in which they took effect, the faults to come.
// FaultyFile is the File through which one image uses it.
//
// Everything a test asks of a FaultyDisk may be asked while images use it from other threads.
#pragma once

#include "lib/file.h"

#include <condition_variable>
#include <cstring>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <span>

namespace qlean::fault {

using Bytes = std::vector<std::byte>;

/// What std::equal does one byte at a time, for it does not know that these are bytes.
inline bool same_bytes(std::span<const std::byte> a, std::span<const std::byte> b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size()) == 0);
}

enum class Op : std::uint8_t { read, write, sync, truncate, punch, zero, reserve, share };
constexpr unsigned op_count = 8;
constexpr unsigned mask(Op op) { return 1u << static_cast<unsigned>(op); }
constexpr unsigned any_change = mask(Op::write) | mask(Op::sync) | mask(Op::truncate) | mask(Op::punch) |
                                mask(Op::zero) | mask(Op::reserve) | mask(Op::share);
const char *name_of(Op op);

/// One operation as a test sees it: `at` and `length` are bytes; for a truncate `at` is the new length.
struct Request {
    Op op;
    std::uint64_t at, length;
};
using Filter = std::function<bool(const Request &)>;

/// The nth request from now on that `ops` (and `only`) select fails, and all later ones if it is lasting.
struct Fault {
    unsigned ops = any_change;
    std::uint64_t nth = 1;
    int code = EIO;
    bool lasting = false;
    /// A write or a share that fails has put this many bytes into the file before, at most; whole sectors.
    std::uint64_t partial = 0;
    Filter only;
};

/// What happened to the file, in order.
struct Event {
    enum class Kind : std::uint8_t { write, zeroes, length, sync_began, sync_ended, sync_failed };
    Kind kind;
    bool is_punch = false; ///< of zeroes
    std::uint64_t at = 0;  ///< bytes; of length: the new one
    std::uint64_t length = 0;
    Bytes bytes; ///< of write
};

class FaultyDisk {
  public:
    static constexpr std::uint64_t sector = 512;

    explicit FaultyDisk(Bytes bytes = {});

    Bytes bytes() const;
    std::uint64_t length() const;
    /// Starts to record, from the bytes as they are now.
    void record();
    std::size_t recorded() const;
    /// Not while an image uses the disk.
    const std::vector<Event> &events() const { return events_; }
    const Bytes &first_bytes() const { return first_; }

    void fail(Fault fault);
    void heal();
    /// The fault has struck.
    bool struck() const;
    std::uint64_t count(unsigned ops) const;
    /// While one lives nothing fails and nothing is counted: for what a test does on its own account.
    class Truce {
      public:
        explicit Truce(FaultyDisk &disk) : disk_(disk) { ++disk_.truces_; }
        ~Truce() { --disk_.truces_; }
        Truce(const Truce &) = delete;
        Truce &operator=(const Truce &) = delete;

      private:
        FaultyDisk &disk_;
    };
    /// Reads report that a device would have to be waited for, once for each place.
    void start_cold(bool cold);
    /// What the host's file system cannot do.
    void refuse_punch(bool refuse);
    void refuse_zero(bool refuse);
    /// The host's file system shares blocks, which it does not by default.
    void allow_share(bool allow);

    /// Called before (or after) each request, with no lock of the disk held; it may wait. Removed by number.
    int add_hook(bool before, std::function<void(const Request &)> hook);
    void remove_hook(int number);

  private:
    friend class FaultyFile;
    struct Hook {
        int number;
        bool before;
        std::function<void(const Request &)> call;
    };

    void run_hooks(bool before, const Request &request);
    /// With the mutex held: throws if the request is to fail; a failing write leaves its part first.
    void maybe_fail(const Request &request, std::span<const std::byte> from);
    void store(std::uint64_t at, std::span<const std::byte> from);
    void store_zeroes(std::uint64_t at, std::uint64_t length, bool punch);
    void set_length(std::uint64_t length);
    void log(Event event);

    mutable std::mutex mutex_;
    Bytes bytes_, first_;
    std::vector<bool> data_; // per sector: not a hole
    std::vector<Event> events_;
    bool recording_ = false;
    std::optional<Fault> fault_;
    bool struck_ = false;
    std::uint64_t counts_[op_count] = {};
    bool cold_ = false, refuse_punch_ = false, refuse_zero_ = false, allow_share_ = false;
    std::vector<std::pair<std::uint64_t, std::uint64_t>> warmed_;
    std::list<std::shared_ptr<Hook>> hooks_;
    int next_hook_ = 0;
    std::atomic<int> hook_count_{0}, truces_{0};
    std::string name_ = "faulty.qcow2";
};

class FaultyFile : public File {
  public:
    explicit FaultyFile(std::shared_ptr<FaultyDisk> disk) : disk_(std::move(disk)) {}

    void read(std::span<std::byte> into, HostOffset at) override;
    bool read_cached(std::span<std::byte> into, HostOffset at) override;
    void write(std::span<const std::byte> from, HostOffset at) override;
    void sync() override;
    void truncate(std::uint64_t length) override;
    bool punch(HostOffset at, std::uint64_t length) override;
    bool zero_keeping_space(HostOffset at, std::uint64_t length) override;
    void reserve_space(HostOffset at, std::uint64_t length) override;
    /// In the record it is a write: before a sync all of it, some of it or nothing may be there.
    bool share(HostOffset from, HostOffset to, std::uint64_t length) override;
    std::uint64_t length() override { return disk_->length(); }
    std::uint64_t allocated() override;
    std::optional<HostOffset> next_data(HostOffset at) override;
    void will_need(HostOffset, std::uint64_t) override {}
    void start_writing_out(HostOffset, std::uint64_t) override {}
    const std::string &name() const override { return disk_->name_; }

  private:
    bool give_zeroes(Op op, HostOffset at, std::uint64_t length);

    std::shared_ptr<FaultyDisk> disk_;
};

/// Stops the first thread that makes a request which `select` accepts, before or after it, until released.
class Breakpoint {
  public:
    enum class When { before, after };
    Breakpoint(std::shared_ptr<FaultyDisk> disk, When when, Filter select);
    ~Breakpoint();
    /// A thread has stopped here. False if none has within ten seconds.
    bool wait();
    bool hit() const;
    void release();

  private:
    std::shared_ptr<FaultyDisk> disk_;
    mutable std::mutex mutex_;
    std::condition_variable changed_;
    bool hit_ = false, released_ = false;
    int inside_ = 0;
    int hook_;
};

} // namespace qlean::fault
