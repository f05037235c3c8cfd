// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The pass loop and its requests. Two numbers steer it: how many requests may be in flight (one or fifteen, by the
// server's version) and how many planned bytes may be uncommitted before a FLUSH goes out.
// Where there is no guest that we are to mind and no limit to keep, the first pass of `compact` is wide, if the server
// bounds what it does by one request: one at a time, for all of the disk or what fits into one, so that the server may
// begin with what it likes best. What such a pass leaves is done piece by piece.
#include "operation.h"

#include "connection.h"
#include "courtesy.h"
#include "failure.h"
#include "pace.h"
#include "progress.h"
#include "signals.h"
#include "status_page.h"
#include "target.h"
#include "units.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>

namespace qlean {

namespace {

constexpr std::uint64_t flush_every = 32 * mebibyte;
// What has been sent and is not known to be committed never exceeds this: answered, in flight, and in a running FLUSH.
constexpr std::uint64_t uncommitted_limit = 64 * mebibyte;
// How often a wide pass cuts the file.
constexpr std::uint64_t wide_flush_every = 512 * mebibyte;
constexpr auto consider_every = std::chrono::milliseconds(500);

// Small pieces keep a slow disk's drain short, and fifteen of 2 MiB fit beside a FLUSH of 32 MiB. Under a rate limit a
// piece is at most one second's worth, so that the pace is even, and out of courtesy it is short; never less than a
// cluster, because half a cluster cannot be done.
std::uint64_t piece_size(unsigned depth, const Speed &speed, std::uint64_t cluster_size) {
    std::uint64_t size = depth == 1 ? 4 * mebibyte : 2 * mebibyte;
    if (speed.courtesy != nullptr && speed.courtesy->rate()) {
        size = mebibyte;
    }
    if (speed.limit && *speed.limit < 16 * mebibyte) {
        size = std::min(mebibyte, std::bit_floor(*speed.limit));
    }
    return std::max(size, cluster_size);
}

} // namespace

bool StopCondition::reached() const { return signals::stop_requested() || (deadline_ && Clock::now() >= *deadline_); }

StopCondition StopCondition::half() const {
    if (!deadline_) {
        return *this;
    }
    const auto now = Clock::now();
    return StopCondition(now + std::max(*deadline_ - now, Clock::duration::zero()) / 2);
}

std::string StopCondition::reason() const {
    if (signals::stop_requested()) {
        return signals::reason();
    }
    return reached() ? "max-time" : "";
}

struct Operation::Slot {
    Ticket ticket;
    bool used = false;
    bool is_flush = false;
    std::uint32_t planned = 0;
};

Operation::Operation(const Target &target, Connection &status, Pace &pace, const Speed &speed, Progress &progress,
                     const StopCondition &stop, OperationReport &report)
    : target_(target), status_(status), pace_(pace), speed_(speed), progress_(progress), stop_(stop), report_(report),
      before_(StatusPage::read(status_)), slots_(std::make_unique<std::array<Slot, 15>>()) {
    depth_ = std::min<unsigned>(before_.depth(), slots_->size());
    piece_size_ = piece_size(depth_, speed_, before_.cluster_size());
    if (const auto most = before_.most_by_request(); most && report_.name == "compact") {
        wide_share_ = std::max(*most, mebibyte);
    }
}

Operation::~Operation() = default;

bool Operation::run() {
    const auto started = StopCondition::Clock::now();
    struct Stopwatch { // the report is right however we leave
        StopCondition::Clock::time_point started;
        double &seconds;
        ~Stopwatch() { seconds = std::chrono::duration<double>(StopCondition::Clock::now() - started).count(); }
    } const stopwatch{started, report_.elapsed_seconds};

    connection_ = std::make_unique<Connection>(target_, report_.name);
    if (!connection_->can_cache()) {
        throw Failure(fmt::format("the server does not let '{}' change the image: it was started read-only (-r), or a "
                                  "filter hides NBD_CMD_CACHE; restart it without",
                                  report_.name));
    }
    Plan plan;
    if (!read_plan(plan)) {
        return false;
    }
    report_.planned_bytes = plan.bytes;
    report_.planned_ranges = plan.ranges;
    report_.remaining_bytes = plan.bytes;
    auto pending = read_pending();
    report_.pending = pending;

    // Each pass must set a new record in one of two natural numbers, so the loop ends whatever the guest does
    // meanwhile.
    std::uint64_t best_bytes = plan.bytes;
    std::uint64_t best_pending = pending.value_or(0);
    const bool always_flush = report_.name == "compact" && !pending;
    while (!stop_.reached() && (!plan.empty() || pending.value_or(0) != 0 || (always_flush && report_.passes == 0))) {
        report_.passes += 1;
        const bool was_wide = wide_;
        pass(plan);
        report_.remaining_bytes = plan.bytes - pass_done_; // all we know if we are stopped before the next plan
        if (!read_plan(plan)) {
            return false;
        }
        pending = read_pending();
        report_.remaining_bytes = plan.bytes;
        report_.pending = pending;
        const std::uint64_t waiting = pending.value_or(0);
        if (!was_wide && plan.bytes >= best_bytes && waiting >= best_pending) {
            if (!plan.empty() || waiting != 0) {
                const std::string error = StatusPage::read(status_).error_since(before_);
                report_.note = fmt::format(
                    "{}: the last pass gained nothing; {}{} left: {}", report_.name, show_bytes(plan.bytes),
                    waiting == 0 ? "" : fmt::format(" and {} clusters of metadata", waiting),
                    error.empty() ? "the guest is using it just now, or there is no better place for it" : error);
            }
            return true;
        }
        best_bytes = std::min(best_bytes, plan.bytes);
        best_pending = std::min(best_pending, waiting);
    }
    return plan.empty() && pending.value_or(0) == 0;
}

bool Operation::read_plan(Plan &plan) {
    progress_.phase(fmt::format("{}: reading the plan", report_.name));
    wide_ = wide_share_ != 0 && report_.passes == 0 && !considerate() && !speed_.limit;
    PlanBuilder builder = wide_ ? PlanBuilder::wide(wide_share_) : PlanBuilder(piece_size_);
    const bool complete = read_ranges(
        *connection_, [&](Range range) { builder.add(range); }, [&] { return !stop_.reached(); });
    plan = complete ? builder.take() : Plan{};
    wide_ = wide_ && !plan.empty();
    return complete;
}

std::optional<std::uint64_t> Operation::read_pending() {
    return report_.name == "compact" ? StatusPage::read(status_).pending() : std::nullopt;
}

void Operation::pass(const Plan &plan) {
    if (!plan.empty()) {
        progress_.begin(report_.passes == 1 ? report_.name : fmt::format("{}, pass {}", report_.name, report_.passes),
                        plan.bytes);
    }
    pass_done_ = 0;
    pace_.restart(Pace::Clock::now());
    std::size_t next = 0;
    while (error_ == 0 && !stop_.reached() && next < plan.pieces.size()) {
        consider_guest();
        if (wide_ && considerate()) {
            break; // a guest has come: piece by piece from here on
        }
        send(plan, next);
        int wait = 100; // the progress line and the time limit want to be looked at that often
        if (next < plan.pieces.size() && in_flight() < depth()) {
            // Rounded up: waking a fraction of a millisecond early would spin.
            const auto delay = pace_.delay(plan.pieces[next].planned, Pace::Clock::now());
            const auto milliseconds = std::chrono::ceil<std::chrono::milliseconds>(delay).count();
            if (milliseconds > 0) {
                wait = static_cast<int>(std::min<std::int64_t>(wait, milliseconds));
            }
        }
        connection_->pump(wait);
        collect();
        progress_.update(pass_done_);
    }
    wait_all();
    // A client that was refused at once has nothing to commit, and no business in the work of the one that was not.
    if (error_ == 0 || (report_.handled_bytes != 0 && !error_from_flush_ && !connection_->lost())) {
        const int first = error_;
        commit_until_settled();
        error_ = first != 0 ? first : error_;
    }
    progress_.end();
    if (error_ != 0) {
        explain();
    }
}

/// Twice a second: how the guest fares decides how fast we go on.
void Operation::consider_guest() {
    const auto now = Pace::Clock::now();
    if (speed_.courtesy == nullptr || now - considered_ < consider_every) {
        return;
    }
    std::optional<double> p99_us;
    try {
        p99_us = StatusPage::read(status_).guest_p99_us();
    } catch (const Failure &) {
        considered_ = Pace::Clock::now(); // it is a look aside; if the server is gone, the work itself will tell
        return;
    }
    const auto then = Pace::Clock::now();
    const double seconds = std::chrono::duration<double>(then - considered_).count();
    const auto handled = static_cast<double>(report_.handled_bytes - handled_before_);
    considered_ = then;
    handled_before_ = report_.handled_bytes;
    speed_.courtesy->sample(p99_us, static_cast<std::uint64_t>(handled / seconds));
    const auto courteous = speed_.courtesy->rate();
    pace_.set_rate(courteous && speed_.limit ? std::min(*courteous, *speed_.limit)
                                             : (courteous ? courteous : speed_.limit));
}

void Operation::send(const Plan &plan, std::size_t &next) {
    while (in_flight() < depth()) {
        Slot *slot = free_slot();
        if (since_flush_ >= (wide_ ? wide_flush_every : flush_every) && !flush_in_flight_) {
            start_flush(*slot);
            continue;
        }
        if (next >= plan.pieces.size()) {
            return;
        }
        const Piece &piece = plan.pieces[next];
        if (!wide_ && uncommitted() + piece.planned > uncommitted_limit) {
            return; // until the FLUSH in flight, or the one that the next answers make due, is answered
        }
        const auto now = Pace::Clock::now();
        if (pace_.delay(piece.planned, now) > Pace::Clock::duration::zero()) {
            return;
        }
        pace_.sent(piece.planned, now);
        *slot = {.ticket = {}, .used = true, .is_flush = false, .planned = piece.planned};
        connection_->start_cache(piece.offset, piece.span, slot->ticket);
        next += 1;
    }
}

void Operation::collect() {
    for (Slot &slot : *slots_) {
        if (!slot.used || !slot.ticket.done) {
            continue;
        }
        slot.used = false;
        if (slot.is_flush) {
            flush_in_flight_ = false;
            in_flush_ = 0;
        }
        if (slot.ticket.error != 0) {
            if (error_ == 0) {
                error_ = slot.ticket.error;
                error_from_flush_ = slot.is_flush;
            }
        } else if (slot.is_flush) {
            report_.flushes += 1;
        } else {
            pass_done_ += slot.planned;
            since_flush_ += slot.planned;
            report_.handled_bytes += slot.planned;
        }
    }
}

void Operation::wait_all() {
    collect();
    while (in_flight() != 0) {
        connection_->pump(100);
        collect();
        progress_.update(pass_done_);
    }
}

void Operation::start_flush(Slot &slot) {
    slot = {.ticket = {}, .used = true, .is_flush = true, .planned = 0};
    flush_in_flight_ = true;
    in_flush_ = since_flush_;
    since_flush_ = 0;
    connection_->start_flush(slot.ticket);
}

std::uint64_t Operation::uncommitted() const {
    std::uint64_t bytes = since_flush_ + in_flush_;
    for (const Slot &slot : *slots_) {
        bytes += slot.used ? slot.planned : 0;
    }
    return bytes;
}

void Operation::flush_and_wait() {
    start_flush(*free_slot());
    wait_all();
}

// One FLUSH commits what was moved. Metadata moves in FLUSH too, a bounded step each: as long as that gains something,
// flush again without reading a plan that cannot have grown in between.
void Operation::commit_until_settled() {
    progress_.phase(fmt::format("{}: committing", report_.name));
    flush_and_wait();
    auto before = error_ == 0 ? read_pending() : std::nullopt;
    while (error_ == 0 && before.value_or(0) != 0 && !stop_.reached()) {
        flush_and_wait();
        const auto after = error_ == 0 ? read_pending() : std::nullopt;
        if (!after || *after >= *before) {
            break;
        }
        before = after;
    }
}

Operation::Slot *Operation::free_slot() {
    return &*std::find_if(slots_->begin(), slots_->end(), [](const Slot &slot) { return !slot.used; });
}

unsigned Operation::in_flight() const {
    return static_cast<unsigned>(
        std::count_if(slots_->begin(), slots_->end(), [](const Slot &slot) { return slot.used; }));
}

/// Beside a guest few at a time: many at once, after a pause, would all stand in its way together.
unsigned Operation::depth() const {
    constexpr unsigned courteous = 2;
    return wide_ ? 1 : considerate() ? std::min(depth_, courteous) : depth_;
}

/// There is a guest, and we are to mind it.
bool Operation::considerate() const { return speed_.courtesy != nullptr && speed_.courtesy->rate(); }

void Operation::explain() {
    const bool lost = connection_->lost();
    // Our own ownership ends with our connection, so an owner seen after this is somebody else.
    connection_->close();
    const std::string kept = "; what was finished is kept";
    const char *const again = target_.is_private() ? "run the command again" : "run the command again when it is back";
    if (error_ == ESHUTDOWN) {
        throw Failure(
            fmt::format("{}: the server is shutting down{}, {}{}", report_.name, kept, again, target_.server_words()),
            ExitCode::server_gone);
    }
    if (lost) {
        throw Failure(fmt::format("{}: the connection to the server was lost{}, {}{}", report_.name, kept, again,
                                  target_.server_words()),
                      ExitCode::server_gone);
    }
    std::string said;
    std::optional<Owner> owner;
    try {
        const StatusPage page = StatusPage::read(status_);
        owner = page.owner();
        said = page.error_since(before_);
    } catch (const Failure &) {
        // The errno alone has to do.
    }
    if (error_ == EPERM && owner) {
        throw Failure(
            fmt::format("{}: the server is busy: '{}' is being run by another client (connection {}); try again "
                        "when it has finished{}",
                        report_.name, owner->operation, owner->connection, said.empty() ? "" : " (" + said + ")"),
            ExitCode::busy);
    }
    if (error_ == EPERM) {
        throw Failure(fmt::format("{}: the server refused: {}", report_.name,
                                  said.empty() ? "operation not permitted; its log says why" : said));
    }
    throw Failure(fmt::format("{}: the server failed{}: {}{}", report_.name, error_from_flush_ ? " to commit" : "",
                              said.empty() ? std::string(std::strerror(error_)) + "; its log says more" : said,
                              error_from_flush_ ? "" : kept));
}

} // namespace qlean
