// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// What a check found, in the terms of `qemu-img check`: the same image gives the same numbers.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace qlean {

/// What a repair may change. `leaks` lowers refcounts that nothing refers to, `all` makes everything consistent again.
enum class Repair { none, leaks, all };

struct CheckReport {
    static constexpr std::size_t max_problems = 50;

    std::uint64_t image_end_offset = 0; ///< bytes: the end of the last cluster that is in use
    std::uint64_t total_clusters = 0;   ///< of the guest's disk; the next three are parts of it
    std::uint64_t allocated_clusters = 0, fragmented_clusters = 0, compressed_clusters = 0;
    std::uint64_t leaks = 0;        ///< clusters with more refcounts than references
    std::uint64_t corruptions = 0;  ///< what may cost data
    std::uint64_t check_errors = 0; ///< what could not be checked
    std::uint64_t leaks_fixed = 0, corruptions_fixed = 0;
    std::vector<std::string> problems; ///< a sentence each, the first ones only

    bool clean() const { return leaks == 0 && corruptions == 0 && check_errors == 0; }
    void add_problem(std::string text) {
        if (problems.size() < max_problems)
            problems.push_back(std::move(text));
    }
};

} // namespace qlean
