// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "image.h"

#include "at_work.h"
#include "cluster_io.h"
#include "disk_view.h"
#include "error.h"

#include <chrono>
#include <cstring>
#include <mutex>
#include <shared_mutex>

namespace qlean {

namespace {

constexpr std::uint64_t punch_step_bytes = 32 * 1024 * 1024;
constexpr std::uint64_t max_unreturned_bytes = 32 * 1024 * 1024;
constexpr std::uint64_t min_dirty_bytes = 128 * 1024;
constexpr auto commit_interval = std::chrono::seconds(5);

} // namespace

Image::Image(std::unique_ptr<State> state) : owner_(std::move(state)), state_(*owner_) {}

Image::~Image() { stop_housekeeping(); }

// --- reading ------------------------------------------------------------------------------------------------------

void Image::read(std::span<std::byte> into, GuestOffset at) {
    const Geometry &g = state_.geometry;
    while (!into.empty()) {
        const auto piece = into.first(std::min<std::uint64_t>(into.size(), data_chunk - at.value % data_chunk));
        const GuestCluster first = g.cluster_of(at);
        Mappings held((g.cluster_of(at + (piece.size() - 1)) - first) + 1);
        const std::span<Mapping> mappings = held.all();
        const RangeLock::Shared guard(state_.ranges, at, piece.size());
        state_.mapper.resolve(first, mappings);
        auto reads =
            joined<std::byte>([&](std::span<std::byte> bytes, HostOffset from) { state_.data.read(bytes, from); });
        auto reads_below = joined<std::byte, GuestOffset>(
            [&](std::span<std::byte> bytes, GuestOffset from) { state_.contents.below()->read(bytes, from); });
        each_cluster(g, at, piece.size(),
                     [&](std::uint64_t done, GuestCluster c, std::uint64_t within, std::uint64_t n) {
                         const Mapping &mapping = mappings[c - first];
                         if (mapping.kind == Mapping::Kind::data)
                             reads.add(piece.subspan(done, n), g.offset_of(mapping.host) + within);
                         else if (mapping.kind == Mapping::Kind::unallocated && !state_.contents.ends_below(c))
                             reads_below.add(piece.subspan(done, n), at + done);
                         else
                             state_.contents.read(c, mapping, within, piece.subspan(done, n));
                     });
        reads.finish();
        reads_below.finish();
        into = into.subspan(piece.size());
        at += piece.size();
    }
}

std::vector<Image::Extent> Image::extents(GuestOffset at, std::uint64_t length, std::size_t most) {
    const Geometry &g = state_.geometry;
    ExtentList found(state_, most);
    std::vector<Mapping> mappings;
    const GuestOffset end = at + length;
    while (at < end && !found.full()) {
        const GuestCluster first = g.cluster_of(at);
        GuestOffset stop = std::min(end, at + (unmap_chunk_bytes - at.value % unmap_chunk_bytes));
        if (!state_.mapper.has_table(first)) {
            // A table that appears meanwhile is a write that came after this answer.
            stop = std::min(end, g.offset_of(state_.mapper.table_end(first)));
            found.add_unallocated(at, stop);
        } else {
            mappings.resize((g.cluster_of(stop - 1) - first) + 1);
            const RangeLock::Shared guard(state_.ranges, at, stop - at);
            state_.mapper.resolve(first, mappings);
            each_cluster(g, at, stop - at, [&](std::uint64_t, GuestCluster c, std::uint64_t within, std::uint64_t n) {
                found.add(c, mappings[c - first], within, n);
            });
            found.settle();
        }
        at = stop;
    }
    return found.take();
}

void Image::prefetch(GuestOffset at, std::uint64_t length) {
    const Geometry &g = state_.geometry;
    const GuestOffset end = at + length;
    std::vector<Mapping> mappings;
    while (at < end) {
        const GuestOffset stop = std::min(end, at + (data_chunk - at.value % data_chunk));
        const GuestCluster first = g.cluster_of(at);
        mappings.resize((g.cluster_of(stop - 1) - first) + 1);
        const RangeLock::Shared guard(state_.ranges, at, stop - at);
        state_.mapper.resolve(first, mappings);
        prefetch_mapped(state_, first, mappings, at, stop - at);
        at = stop;
    }
}

// --- durability and housekeeping ----------------------------------------------------------------------------------

/// Before anything of the range changes. No lock held.
void Image::before_change(GuestOffset at, std::uint64_t length) {
    state_.write_back.before_change();
    if (state_.bitmaps)
        state_.bitmaps->mark(at, length);
    // A guest that never flushes must not fill the memory: written back before any lock is taken.
    if (state_.l2.dirty_bytes() > std::max(state_.cache_bytes / 2, min_dirty_bytes))
        state_.write_back.commit(WriteBack::Give::later);
    if (state_.allocator.retired_bytes() > max_unreturned_bytes)
        house_wakes_.notify_one();
}

void Image::flush() {
    if (!state_.read_only)
        state_.write_back.commit(WriteBack::Give::later);
}

/// A thread of compaction may come here when the image is being closed: what close() does then has to be the last.
void Image::give_back() {
    const std::shared_lock guard(open_);
    if (closed_)
        return state_.write_back.require_healthy();
    state_.write_back.commit(WriteBack::Give::back);
    punch();
}

void Image::punch() {
    while (state_.allocator.punch_step(punch_step_bytes)) {
    }
}

void Image::report(const std::exception &error) const {
    if (report_)
        report_(error);
}

void Image::start_housekeeping() {
    {
        const Lock guard(house_mutex_);
        house_stops_ = false;
    }
    if (!state_.read_only)
        house_ = std::thread([this] { keep_house(); });
}

void Image::keep_house() {
    const AtWork working;
    Lock guard(house_mutex_);
    while (!house_stops_) {
        const auto deadline = std::chrono::steady_clock::now() + commit_interval;
        while (!house_stops_ &&
               (state_.write_back.poisoned() || state_.allocator.retired_bytes() <= max_unreturned_bytes))
            if (guard.wait_until(house_wakes_, deadline) == std::cv_status::timeout)
                break;
        if (house_stops_)
            return;
        guard.unlock();
        try {
            if (!state_.write_back.poisoned()) {
                if (state_.write_back.anything_to_commit())
                    state_.write_back.commit(WriteBack::Give::back);
                punch();
            }
        } catch (const std::exception &error) {
            report(error);
            std::this_thread::sleep_for(std::chrono::milliseconds(100));
        }
        guard.lock();
    }
}

void Image::on_background_error(std::function<void(const std::exception &)> report) {
    report_ = std::move(report);
    hook_up();
}

void Image::on_poison(std::function<void()> call) {
    poison_ = std::move(call);
    hook_up();
}

/// Tells the parts whom to call.
void Image::hook_up() {
    state_.write_back.on_poison(poison_);
    if (state_.bitmaps)
        state_.bitmaps->on_problem(report_);
}

/// False: they did not change. If it fails they stay marked as inconsistent; the guest's data is safe without them.
bool Image::store_bitmaps() {
    try {
        return state_.bitmaps && state_.bitmaps->store();
    } catch (const std::exception &error) {
        report(error);
        return true;
    }
}

void Image::stop_housekeeping() {
    {
        const Lock guard(house_mutex_);
        house_stops_ = true;
    }
    house_wakes_.notify_all();
    if (house_.joinable())
        house_.join();
}

Image::BeforeClose::BeforeClose(Image &image, std::function<void()> call) : calls_(image.before_close_) {
    const Lock guard(calls_->mutex);
    here_ = calls_->list.insert(calls_->list.end(), std::move(call));
}

Image::BeforeClose::~BeforeClose() {
    const Lock guard(calls_->mutex);
    calls_->list.erase(here_);
}

void Image::close() {
    stop_housekeeping();
    {
        const Lock guard(before_close_->mutex);
        for (const auto &call : before_close_->list)
            call();
    }
    {
        const std::lock_guard guard(open_);
        closed_ = true;
    }
    if (state_.read_only || state_.write_back.poisoned())
        return;
    const bool idle = !state_.write_back.changed();
    state_.write_back.commit(idle ? WriteBack::Give::later : WriteBack::Give::back);
    if ((!store_bitmaps() && idle) || state_.write_back.poisoned())
        return;
    // Only what was grown since: below that, a refcount of zero is believed only after a complete walk.
    while (state_.allocator.truncate_step(punch_step_bytes, HostCluster{state_.opened_end})) {
    }
    try {
        punch();
    } catch (const Error &error) {
        report(error); // less is given back, and nothing else depends on it
    }
    state_.write_back.lead([&] { state_.write_back.sync_as_leader(); });
}

} // namespace qlean
