// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// What the tests named after bugs share: an image on a faulty disk with a model of what the guest wrote, which several
// threads may use on ranges that do not overlap, and what is asked of the image at the end of every test.
#pragma once

#include "tests/fault/scene.h"

namespace qlean::fault {

inline const StopCheck go_on = [] { return false; };
constexpr std::size_t all_of_it = std::size_t{1} << 20;
/// Whoever has not finished by then is taken to be blocked.
constexpr std::chrono::seconds patience{10};

class Rig {
  public:
    explicit Rig(Bytes bytes, std::uint64_t cache_bytes = 64 * 1024);

    std::shared_ptr<FaultyDisk> disk;
    std::unique_ptr<Image> image;
    Bytes model;
    MoveOwnership ownership;
    Gauges gauges;

    std::uint64_t cluster() const { return image->geometry().cluster_size(); }
    // Guest bytes; trims of whole clusters only, so that they read as zeroes.
    void write(std::uint64_t at, std::uint64_t length, unsigned value);
    void trim(std::uint64_t at, std::uint64_t length);
    /// The range reads as the model says.
    bool reads_right(std::uint64_t at, std::uint64_t length);
    bool reads_right() { return reads_right(0, model.size()); }
    /// For other threads than the test's own, which must not use Catch's macros.
    void must_read(std::uint64_t at, std::uint64_t length) {
        if (!reads_right(at, length))
            throw std::runtime_error(fmt::format("guest bytes from {:#x} are not what was written", at));
    }
    /// The host offset that a guest cluster maps to, or 0.
    std::uint64_t host_of(std::uint64_t guest_cluster);
    std::uint64_t l2_home(std::uint64_t table) { return image->state().l1.table(table).value; }

    std::unique_ptr<Compact> connect(std::uint64_t number = 1);
    /// Passes of compaction until nothing is left to do; 0 if that does not come to an end.
    int compact(const std::function<void()> &between = {});

    /// Ends the use without a shutdown, as a crash of the server does, and opens what is in the file.
    void crash_and_reopen();
    /// A clean shutdown. Whatever happened: the file is sound without a leak, for QEMU as well, and both the engine and
    /// a reader that shares no code with it find in it what the guest wrote.
    void finish();

  private:
    std::uint64_t cache_bytes_;
};

/// Runs `plan` once: everything it says is to do.
void run_plan(Compact &compact, std::uint64_t size);

/// Watches that nothing is punched or cut off that the file refers to at that moment. Not for trims of parts of
/// clusters, which may punch what is in use.
class PunchGuard {
  public:
    explicit PunchGuard(std::shared_ptr<FaultyDisk> disk);
    ~PunchGuard() { disk_->remove_hook(hook_); }
    /// What went wrong, if anything.
    std::string text() const;
    std::uint64_t seen() const { return seen_; }

  private:
    std::shared_ptr<FaultyDisk> disk_;
    mutable std::mutex mutex_;
    std::string wrong_;
    std::atomic<std::uint64_t> seen_{0};
    int hook_;
};

/// Collects the requests that `select` accepts.
class Requests {
  public:
    Requests(std::shared_ptr<FaultyDisk> disk, Filter select);
    ~Requests() { disk_->remove_hook(hook_); }
    std::vector<Request> seen() const;

  private:
    std::shared_ptr<FaultyDisk> disk_;
    mutable std::mutex mutex_;
    std::vector<Request> seen_;
    int hook_;
};

/// Whether two ranges of bytes have any in common.
inline bool overlap(std::uint64_t a, std::uint64_t a_length, std::uint64_t b, std::uint64_t b_length) {
    return a < b + b_length && b < a + a_length;
}

/// The sentence of the Error that `request` ends with, or nothing.
std::string said(const std::function<void()> &request);
/// The image is refused with one sentence that contains `word`, and stays as it is.
void refused(const Bytes &bytes, const std::string &word);

} // namespace qlean::fault
