// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Repairing a file that nobody uses: before the first change the header says that a repair is under way, and when all
// is well it says so.
#include "../error.h"
#include "check.h"
#include "mender.h"

#include <optional>

namespace qlean {

namespace {

/// What QEMU keeps up, and so do we; others are no longer to be relied on after a change.
constexpr std::uint64_t known_autoclear = Header::autoclear_bitmaps | Header::autoclear_data_file_raw;

} // namespace

CheckReport check_file(File &file, const StopCheck &stop) {
    Header header = read_header(file).first;
    header.require_known(file.name());
    FileSource source(file, std::move(header));
    Checker checker(source, stop);
    checker.run();
    return std::move(checker.report);
}

CheckReport repair_file(File &file, Repair how, const StopCheck &stop) {
    const Header header = read_header(file).first;
    header.require_known(file.name());
    if (how == Repair::none)
        return check_file(file, stop);
    CheckReport before;
    const auto first_change = [&] {
        if (header.autoclear & ~known_autoclear)
            change_header(file, [](Header &h) { h.autoclear &= known_autoclear; });
    };
    {
        std::optional<Mender> mender(std::in_place, file, stop);
        before = mender->checker.report;
        if (!mender->checker.complete())
            return before;
        if (how == Repair::leaks && before.corruptions == 0 && before.leaks != 0 && !header.has_unknown_extension()) {
            first_change();
            mender->leaks();
        } else if (how == Repair::all && !before.clean()) {
            // Half a repair is a reason to repair first: that is what the dirty bit says to everybody.
            change_header(file, [](Header &h) {
                h.autoclear &= known_autoclear;
                if (h.version >= 3)
                    h.incompatible |= Header::incompatible_dirty;
            });
            // Each may make room for another: an entry that is no more shares nothing, a table of its own may be
            // written, and what comes into the file may be a table.
            constexpr int most = 6;
            for (int i = 0; i < most && (mender->mend_entries() || mender->separate() || mender->take_in()); ++i)
                mender.emplace(file, stop);
            mender->everything();
        }
    }
    CheckReport after = before.clean() ? before : check_file(file, stop);
    after.leaks_fixed = before.leaks - std::min(before.leaks, after.leaks);
    after.corruptions_fixed = before.corruptions - std::min(before.corruptions, after.corruptions);
    constexpr std::uint64_t marks = Header::incompatible_dirty | Header::incompatible_corrupt;
    const std::uint64_t left = after.corruptions == 0 && after.check_errors == 0 ? 0 : header.incompatible & marks;
    if ((read_header(file).first.incompatible & marks) != left)
        change_header(file, [&](Header &h) { h.incompatible = (h.incompatible & ~marks) | left; });
    return after;
}

} // namespace qlean
