// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// What a person sees while work is done, always on stderr. On a terminal one line is redrawn, at most ten times a
// second; elsewhere a plain line at every tenth of the way, at most one a second.
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <string>

namespace qlean {

class Progress {
  public:
    using Clock = std::chrono::steady_clock;

    explicit Progress(bool quiet);
    ~Progress();
    Progress(const Progress &) = delete;
    Progress &operator=(const Progress &) = delete;

    // A phase with a known amount of work, e.g. "compact, pass 2".
    void begin(const std::string &label, std::uint64_t total);
    void update(std::uint64_t done);
    // Leaves the last state on the screen.
    void end();

    // A phase without an amount: "compact: reading the plan". Shown on terminals only; the next output replaces it.
    void phase(const std::string &text);

    // Wipes a phase or a bar that was not ended.
    void clear() { clear_line(); }

    // A line that stays.
    void note(const std::string &text);

  private:
    enum class Mode { off, lines, terminal };

    void draw(Clock::time_point now);
    void clear_line();
    std::string describe(std::size_t bar_width) const;
    double rate() const;

    struct Sample {
        Clock::time_point when;
        std::uint64_t done;
    };

    Mode mode_;
    bool active_ = false;
    bool dirty_line_ = false; // the terminal's current line holds something of ours
    std::string label_;
    std::uint64_t total_ = 0;
    std::uint64_t done_ = 0;
    unsigned tenth_ = 0; // last tenth printed in lines mode
    Clock::time_point started_{};
    Clock::time_point drawn_{};
    std::deque<Sample> samples_; // the last few seconds, for the rate
};

} // namespace qlean
