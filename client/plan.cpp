// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Requests for block status are as long as the protocol allows: an 8 TiB disk takes about two thousand.
#include "plan.h"

#include "connection.h"
#include "failure.h"
#include "units.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

namespace qlean {

namespace {

// Below 4 GiB (the length has 32 bits) and a multiple of the largest cluster.
constexpr std::uint64_t longest_question = 4096 * mebibyte - 2 * mebibyte;

} // namespace

PlanBuilder::PlanBuilder(std::uint64_t target)
    : target_(target), longest_piece_(16 * mebibyte), longest_hole_(mebibyte) {}

PlanBuilder PlanBuilder::wide(std::uint64_t share) {
    PlanBuilder builder(2048 * mebibyte);
    builder.longest_piece_ = builder.longest_hole_ = longest_question;
    builder.share_ = share;
    return builder;
}

void PlanBuilder::append(std::uint64_t offset, std::uint64_t length) {
    if (!plan_.pieces.empty()) {
        Piece &last = plan_.pieces.back();
        const std::uint64_t end = last.offset + last.span;
        const std::uint64_t span = offset + length - last.offset;
        if (offset - end <= longest_hole_ && span <= longest_piece_ && last.planned + length <= target_) {
            last.span = static_cast<std::uint32_t>(span);
            last.planned += static_cast<std::uint32_t>(length);
            return;
        }
    }
    plan_.pieces.push_back({offset, static_cast<std::uint32_t>(length), static_cast<std::uint32_t>(length)});
}

Plan PlanBuilder::take() {
    if (share_ != 0) {
        std::vector<Piece> repeated;
        for (const Piece &piece : plan_.pieces) {
            for (std::uint64_t left = piece.planned; left != 0; left -= repeated.back().planned) {
                repeated.push_back({piece.offset, piece.span, static_cast<std::uint32_t>(std::min(left, share_))});
            }
        }
        plan_.pieces = std::move(repeated);
    }
    return std::move(plan_);
}

void PlanBuilder::add(Range range) {
    plan_.bytes += range.length;
    plan_.ranges += 1;
    while (range.length != 0) {
        // Up to the next multiple of the target size: the cuts of one plan are the cuts of the next.
        const std::uint64_t cut = (range.offset / target_ + 1) * target_;
        const std::uint64_t length = std::min(range.length, cut - range.offset);
        append(range.offset, length);
        range.offset += length;
        range.length -= length;
    }
}

bool read_ranges(Connection &connection, const std::function<void(Range)> &each,
                 const std::function<bool()> &keep_going) {
    if (!connection.has_block_status()) {
        throw Failure(
            fmt::format("the server does not offer block status on export '{}', so its plan cannot be read; is it "
                        "run with --no-sr or the noextents filter?",
                        connection.export_name()));
    }
    const std::uint64_t size = connection.size();
    Range open{0, 0};
    const auto close_range = [&] {
        if (open.length != 0) {
            each(open);
        }
    };
    const auto take = [&](const Extent &extent) {
        // The last extent of a reply may run past the question, even past the disk.
        const std::uint64_t length = extent.offset < size ? std::min(extent.length, size - extent.offset) : 0;
        if (extent.hole || length == 0) {
            return;
        }
        if (open.length != 0 && open.offset + open.length == extent.offset) {
            open.length += length;
        } else {
            close_range();
            open = {extent.offset, length};
        }
    };
    for (std::uint64_t offset = 0; offset < size;) {
        if (!keep_going()) {
            return false;
        }
        offset = connection.block_status(offset, std::min(longest_question, size - offset), take);
    }
    close_range();
    return true;
}

void PlanTable::add(const std::string &operation, std::uint64_t bytes, std::uint64_t ranges,
                    const std::vector<Range> &map) {
    if (!std::exchange(has_heading_, true)) {
        fmt::print("{:<12} {:>18} {:>10}\n", "operation", "to do", "ranges");
    }
    fmt::print("{:<12} {:>18} {:>10}\n", operation, show_bytes(bytes), ranges);
    for (const Range &range : map) {
        fmt::print("{:>20} {:>20}\n", range.offset, range.length);
    }
    flush_output();
}

} // namespace qlean
