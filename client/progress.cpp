// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The rate shown is that of the last five seconds while work goes on, and the average of the phase at its end.
#include "progress.h"

#include "units.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <sys/ioctl.h>
#include <unistd.h>

namespace qlean {

namespace {

using namespace std::chrono_literals;

std::size_t terminal_columns() {
    winsize size{};
    return ::ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
}

void put(const std::string &text) {
    std::fwrite(text.data(), 1, text.size(), stderr);
    std::fflush(stderr);
}

} // namespace

Progress::Progress(bool quiet) : mode_(quiet ? Mode::off : ::isatty(STDERR_FILENO) ? Mode::terminal : Mode::lines) {}

Progress::~Progress() { clear_line(); }

void Progress::begin(const std::string &label, std::uint64_t total) {
    label_ = label;
    total_ = total;
    done_ = 0;
    tenth_ = 0;
    active_ = true;
    started_ = Clock::now();
    drawn_ = started_ - 1h;
    samples_.assign(1, {started_, 0});
    if (mode_ == Mode::lines) {
        // The first tenth is worth a line only after a second.
        drawn_ = started_;
    } else {
        update(0);
    }
}

void Progress::update(std::uint64_t done) {
    if (!active_) {
        return; // a pass that only commits has no amount to show
    }
    done_ = std::min(done, total_);
    const auto now = Clock::now();
    if (now - samples_.back().when >= 100ms) {
        samples_.push_back({now, done_});
        while (samples_.size() > 2 && now - samples_.front().when > 5s) {
            samples_.pop_front();
        }
    }
    draw(now);
}

void Progress::draw(Clock::time_point now) {
    if (mode_ == Mode::terminal && now - drawn_ >= 100ms) {
        drawn_ = now;
        // Never into the last column: terminals wrap there, and the line would no longer be one.
        const std::size_t width = terminal_columns() - 1;
        std::string line = describe(0);
        if (line.size() + 14 <= width) {
            line = describe(std::min<std::size_t>(width - line.size() - 4, 40));
        }
        put("\r" + line.substr(0, width) + "\x1b[K");
        dirty_line_ = true;
    } else if (mode_ == Mode::lines && now - drawn_ >= 1s && total_ != 0) {
        const auto tenth = static_cast<unsigned>(static_cast<double>(done_) / static_cast<double>(total_) * 10);
        if (tenth > tenth_ && tenth < 10) {
            tenth_ = tenth;
            drawn_ = now;
            put(describe(0) + "\n");
        }
    }
}

void Progress::end() {
    if (!active_) {
        return;
    }
    active_ = false;
    const auto now = Clock::now();
    samples_.assign({{started_, 0}, {now, done_}});
    const double seconds = std::chrono::duration<double>(now - started_).count();
    if (mode_ != Mode::off && total_ != 0) {
        clear_line();
        put(fmt::format("{}: {} of {} in {:.1f} s, {}/s\n", label_, show_bytes(done_), show_bytes(total_), seconds,
                        show_bytes(static_cast<std::uint64_t>(rate()))));
    }
}

void Progress::phase(const std::string &text) {
    if (mode_ == Mode::terminal) {
        put("\r" + text.substr(0, terminal_columns() - 1) + "\x1b[K");
        dirty_line_ = true;
    }
}

void Progress::note(const std::string &text) {
    if (mode_ != Mode::off) {
        clear_line();
        put(text + "\n");
    }
}

void Progress::clear_line() {
    if (dirty_line_) {
        put("\r\x1b[K");
        dirty_line_ = false;
    }
}

double Progress::rate() const {
    const double seconds = std::chrono::duration<double>(samples_.back().when - samples_.front().when).count();
    return seconds <= 0 ? 0 : static_cast<double>(samples_.back().done - samples_.front().done) / seconds;
}

std::string Progress::describe(std::size_t bar_width) const {
    const double fraction = total_ == 0 ? 1.0 : static_cast<double>(done_) / static_cast<double>(total_);
    std::string bar;
    if (bar_width != 0) {
        const auto full = static_cast<std::size_t>(fraction * static_cast<double>(bar_width));
        bar = "  [" + std::string(full, '#') + std::string(bar_width - full, '.') + "]";
    }
    const double speed = rate();
    const std::string eta =
        speed <= 0
            ? "-"
            : show_duration(std::chrono::seconds(static_cast<long>(static_cast<double>(total_ - done_) / speed + 0.5)));
    return fmt::format("{}{} {:5.1f}%  {:.1f}/{}  {}/s  ETA {}", label_, bar, 100 * fraction,
                       static_cast<double>(done_) / 1048576.0, show_bytes(total_),
                       show_bytes(static_cast<std::uint64_t>(speed)), eta);
}

} // namespace qlean
