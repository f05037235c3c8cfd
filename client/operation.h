// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Runs one maintenance export to its end: read the plan, send CACHE for its pieces, FLUSH as we go, read the plan
// again, until nothing is left or a pass gains nothing. Invariant: whatever ends the run (a signal, the time limit, an
// error), everything in flight is answered and what was done is committed before the connection closes, unless it is
// lost.
#pragma once

#include "pace.h"
#include "plan.h"
#include "status_page.h"

#include <array>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

namespace qlean {

class Connection;
class Courtesy;
class Progress;
class Target;

// How fast an operation may go: at most `limit`, and as `courtesy` finds out, if it is asked.
struct Speed {
    std::optional<std::uint64_t> limit; // bytes per second
    Courtesy *courtesy = nullptr;
};

// Says when to stop early and, once it has, why.
class StopCondition {
  public:
    using Clock = std::chrono::steady_clock;

    explicit StopCondition(std::optional<Clock::time_point> deadline) : deadline_(deadline) {}
    bool reached() const;
    // For an operation that others are to follow: at half of the time that is left.
    StopCondition half() const;
    // "SIGINT", "max-time", or empty.
    std::string reason() const;

  private:
    std::optional<Clock::time_point> deadline_;
};

// What became of one operation; kept up to date while it runs, so it is true after an exception too.
struct OperationReport {
    std::string name;
    std::uint64_t planned_bytes = 0; // the first plan
    std::uint64_t planned_ranges = 0;
    std::uint64_t handled_bytes = 0; // in requests that succeeded, all passes
    unsigned passes = 0;
    unsigned flushes = 0;
    double elapsed_seconds = 0;
    std::optional<std::uint64_t> remaining_bytes; // the last plan
    std::optional<std::uint64_t> pending;         // only `compact`
    std::string note;                             // why something remains
};

class Operation {
  public:
    Operation(const Target &target, Connection &status, Pace &pace, const Speed &speed, Progress &progress,
              const StopCondition &stop, OperationReport &report);
    ~Operation();

    // Throws on errors, after draining and committing. True when there is no more to gain, false when it was stopped.
    bool run();

  private:
    struct Slot;

    // False if it was stopped before the end.
    bool read_plan(Plan &plan);
    std::optional<std::uint64_t> read_pending();
    void pass(const Plan &plan);
    void commit_until_settled();
    void start_flush(Slot &slot);
    void flush_and_wait();
    std::uint64_t uncommitted() const;
    void consider_guest();
    void send(const Plan &plan, std::size_t &next);
    void collect();
    void wait_all();
    Slot *free_slot();
    unsigned in_flight() const;
    unsigned depth() const;
    bool considerate() const;
    [[noreturn]] void explain();

    const Target &target_;
    Connection &status_;
    Pace &pace_;
    const Speed speed_;
    Pace::Clock::time_point considered_{}; // when the guest's latency was looked at
    std::uint64_t handled_before_ = 0;     // bytes, by then
    Progress &progress_;
    const StopCondition &stop_;
    OperationReport &report_;
    const StatusPage before_;
    unsigned depth_;
    std::uint64_t piece_size_;
    std::uint64_t wide_share_ = 0; // what one request does of a wide piece; 0: there are none
    bool wide_ = false;            // the plan that was read last

    std::unique_ptr<std::array<Slot, 15>> slots_; // outlives the connection: requests in flight point into it
    std::unique_ptr<Connection> connection_;
    std::uint64_t pass_done_ = 0;   // planned bytes answered in this pass
    std::uint64_t since_flush_ = 0; // planned bytes answered since the last FLUSH was sent
    std::uint64_t in_flush_ = 0;    // those that the FLUSH in flight covers
    bool flush_in_flight_ = false;
    int error_ = 0; // the first errno a request failed with; nothing is sent after it
    bool error_from_flush_ = false;
};

} // namespace qlean
