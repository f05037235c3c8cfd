// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// A maintenance export's plan: read through block status, and cut into the pieces that CACHE requests will name.
// Invariant of a Plan: pieces ascend and do not overlap, but that a wide one is there as often as it takes; together
// they cover every range to do, and `bytes` counts only what is to do, never the holes that a piece may span.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace qlean {

class Connection;

struct Range {
    std::uint64_t offset;
    std::uint64_t length;
};

struct Piece {
    std::uint64_t offset;
    std::uint32_t span;    // length of the request
    std::uint32_t planned; // bytes in it that are to do
};

struct Plan {
    std::vector<Piece> pieces;
    std::uint64_t bytes = 0;
    std::uint64_t ranges = 0;

    bool empty() const { return pieces.empty(); }
};

// Gathers ranges into pieces. Scattered small ranges share a request, because holes mean nothing to do; a large range
// is cut only at multiples of `target`, so that no cluster is split between two requests.
class PlanBuilder {
  public:
    // At most `target` bytes to do in each piece: a power of two, at least the cluster size.
    explicit PlanBuilder(std::uint64_t target);
    // Or pieces as long as a request can be, each there as often as it takes if one request does `share` bytes of it:
    // what is done first is left to the server.
    static PlanBuilder wide(std::uint64_t share);

    // Ranges must ascend.
    void add(Range range);
    Plan take();

  private:
    void append(std::uint64_t offset, std::uint64_t length);

    std::uint64_t target_;
    std::uint64_t longest_piece_;
    std::uint64_t longest_hole_;
    std::uint64_t share_ = 0; // only if wide
    Plan plan_;
};

// Calls `each` for every range to do, ascending and coalesced across replies. Stops early when `keep_going` says no.
// Returns false if it was stopped.
bool read_ranges(Connection &connection, const std::function<void(Range)> &each,
                 const std::function<bool()> &keep_going);

// Plans as a table on standard output: a row, and the ranges if they are wanted, as soon as a plan has been read, so
// that what is known stays after a signal; the heading comes with the first row, not above an error.
class PlanTable {
  public:
    void add(const std::string &operation, std::uint64_t bytes, std::uint64_t ranges,
             const std::vector<Range> &map = {});

  private:
    bool has_heading_ = false;
};

} // namespace qlean
