// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "allocator.h"

#include "error.h"

#include <algorithm>
#include <bit>

namespace qlean {

namespace {

constexpr std::uint64_t growth_bytes = 1024 * 1024;
constexpr std::uint64_t max_retired_bytes = 32 * 1024 * 1024;

} // namespace

Allocator::Allocator(const Geometry &geometry, File &file, Refcounts &refcounts, const MetadataGuard &guard,
                     std::uint64_t end, EachRun in_use)
    : geometry_(geometry), file_(file), refcounts_(refcounts), guard_(guard), in_use_(std::move(in_use)), end_(end) {
    resize_maps(end);
}

void Allocator::resize_maps(std::uint64_t end) {
    end_ = end;
    free_.resize(end);
    zero_.resize(end);
    reserved_.resize(end);
    loaded_.resize(regions());
    next_unloaded_ = std::min<std::uint64_t>(next_unloaded_, loaded_.size());
    lowest_ = std::min(lowest_, end);
}

Allocator::Reservation &Allocator::Reservation::operator=(Reservation &&other) noexcept {
    std::swap(allocator_, other.allocator_);
    std::swap(extents_, other.extents_);
    return *this;
}

Allocator::Reservation::~Reservation() {
    if (extents_.empty())
        return;
    std::vector<HostRun> runs;
    for (const Extent &e : extents_)
        append_run(runs, e.run);
    publish();
    allocator_->retire(runs);
}

void Allocator::Reservation::publish() {
    if (extents_.empty())
        return;
    const Lock guard(allocator_->mutex_);
    for (const Extent &e : extents_)
        allocator_->no_longer_reserved(e.run);
    extents_.clear();
}

std::uint64_t Allocator::Reservation::count() const {
    std::uint64_t n = 0;
    for (const Extent &e : extents_)
        n += e.run.count;
    return n;
}

Allocator::Extent Allocator::Reservation::take_first() {
    Extent &front = extents_.front();
    const Extent first{{front.run.first, 1}, front.zero};
    {
        const Lock guard(allocator_->mutex_);
        allocator_->no_longer_reserved(first.run);
    }
    ++front.run.first;
    if (--front.run.count == 0)
        extents_.erase(extents_.begin());
    return first;
}

Allocator::Reservation Allocator::Reservation::take_adjacent() {
    Reservation taken;
    taken.allocator_ = allocator_;
    auto last = extents_.begin();
    while (last != extents_.end() && (taken.extents_.empty() || taken.extents_.back().run.end() == last->run.first))
        taken.extents_.push_back(*last++);
    extents_.erase(extents_.begin(), last);
    return taken;
}

void Allocator::Reservation::append(Reservation more) {
    allocator_ = more.allocator_;
    extents_.insert(extents_.end(), more.extents_.begin(), more.extents_.end());
    more.extents_.clear();
}

// --- taking -------------------------------------------------------------------------------------------------------

void Allocator::note(HostRun run) {
    for (Watch *watch : watches_) {
        auto &touched = watch->touched_;
        if (touched.size() < run.end().value)
            touched.resize(std::max(run.end().value, end()));
        std::fill_n(touched.begin() + static_cast<std::ptrdiff_t>(run.first.value), run.count, true);
    }
}

void Allocator::no_longer_reserved(HostRun run) {
    for (std::uint64_t i = 0; i < run.count; ++i)
        reserved_.clear((run.first + i).value);
}

void Allocator::take(std::uint64_t c, std::vector<Extent> &extents) {
    free_.clear(c);
    const bool zero = zero_.get(c);
    zero_.clear(c);
    --free_count_;
    reserved_.set(c);
    note({{c}, 1});
    if (!extents.empty() && extents.back().run.end().value == c && extents.back().zero == zero)
        ++extents.back().run.count;
    else
        extents.push_back({{{c}, 1}, zero});
}

void Allocator::untake(std::vector<Extent> &extents) {
    for (const Extent &e : extents)
        for (std::uint64_t i = 0; i < e.run.count; ++i) {
            no_longer_reserved({e.run.first + i, 1});
            add_free((e.run.first + i).value, e.zero);
        }
    extents.clear();
}

void Allocator::add_free(std::uint64_t c, bool zero) {
    if (c >= end_ || guard_.has({c}))
        return; // its refcount lied: it stays out of use
    free_.set(c);
    if (zero)
        zero_.set(c);
    else
        zero_.clear(c);
    ++free_count_;
    lowest_ = std::min(lowest_, c);
}

void Allocator::take_lowest(std::uint64_t count, std::uint64_t limit, std::vector<Extent> &extents,
                            std::uint64_t floor) {
    limit = std::min(limit, end());
    std::uint64_t c = std::max(lowest_, floor);
    while (count > 0 && free_count_ > 0 && c < limit) {
        const std::uint64_t word = free_.word(c / 64) >> (c % 64);
        if (word == 0) {
            c = round_down(c, 64) + 64;
            continue;
        }
        c += static_cast<std::uint64_t>(std::countr_zero(word));
        if (c >= limit)
            break;
        if (under_embargo(c)) {
            c = embargo_.end().value;
            continue;
        }
        take(c, extents);
        --count;
        ++c;
    }
    if (floor > lowest_)
        return; // what lies between was not looked at
    lowest_ = std::min(c, end());
    if (embargo_.count != 0)
        lowest_ = std::min(lowest_, embargo_.first.value);
}

Allocator::Reservation Allocator::finish(std::vector<Extent> extents) {
    // The increments are recorded with the taking: whoever stores an entry that points here does it later, and the
    // leader collects increments after it has copied entries.
    for (const Extent &e : extents)
        append_run(allocated_runs_, e.run);
    Reservation reservation;
    reservation.allocator_ = this;
    reservation.extents_ = std::move(extents);
    return reservation;
}

bool Allocator::worth_a_commit() const {
    const std::uint64_t worth = std::min(max_retired_bytes / geometry_.cluster_size(), end() / 64);
    return retired_.load(std::memory_order_relaxed) >= std::max<std::uint64_t>(worth, 1);
}

std::optional<std::uint64_t> Allocator::unloaded_region() const {
    for (std::uint64_t r = next_unloaded_; r < loaded_.size(); ++r)
        if (!loaded_[r] && refcounts_.linked(r))
            return r;
    return std::nullopt;
}

Allocator::Reservation Allocator::reserve(std::uint64_t count, Growth growth) {
    std::vector<Extent> extents;
    std::uint64_t have = 0;
    Lock guard(mutex_);
    for (;;) {
        take_lowest(count - have, end_, extents);
        have = 0;
        for (const Extent &e : extents)
            have += e.run.count;
        if (have == count)
            return finish(std::move(extents));
        if (const auto region = unloaded_region()) {
            guard.unlock();
            try {
                load_region(*region);
            } catch (...) {
                guard.lock();
                untake(extents);
                throw;
            }
            guard.lock();
            continue;
        }
        if (growth == Growth::after_commit && worth_a_commit())
            break;
        guard.unlock();
        bool grown = false;
        try {
            grown = grow(count - have);
        } catch (...) {
            guard.lock();
            untake(extents);
            throw;
        }
        guard.lock();
        if (!grown)
            break;
    }
    untake(extents);
    return {};
}

Allocator::Reservation Allocator::reserve_below(std::uint64_t count, HostCluster limit, HostCluster floor) {
    const Lock guard(mutex_);
    std::vector<Extent> extents;
    take_lowest(count, limit.value, extents, floor.value);
    return finish(std::move(extents));
}

Allocator::Reservation Allocator::reserve_contiguous_below(std::uint64_t count, HostCluster limit, HostCluster floor,
                                                           Embargo embargo) {
    const Lock guard(mutex_);
    const std::uint64_t stop = std::min(limit.value, end());
    std::uint64_t run = 0;
    for (std::uint64_t c = std::max(lowest_, floor.value); c < stop; ++c) {
        if (c % 64 == 0 && free_.word(c / 64) == 0) {
            run = 0;
            c += 63;
            continue;
        }
        const bool denied = embargo == Embargo::respected && under_embargo(c);
        run = free_.get(c) && !denied ? run + 1 : 0;
        if (run < count)
            continue;
        std::vector<Extent> extents;
        for (std::uint64_t i = c + 1 - count; i <= c; ++i)
            take(i, extents);
        return finish(std::move(extents));
    }
    return {};
}

Allocator::Reservation Allocator::reserve_contiguous(std::uint64_t count) {
    for (;;) {
        if (auto found = reserve_contiguous_below(count, {end()}); !found.empty())
            return found;
        if (!grow(count))
            return {};
    }
}

void Allocator::embargo(HostRun run) {
    const Lock guard(mutex_);
    embargo_ = run;
    if (run.count != 0)
        lowest_ = std::min(lowest_, run.first.value);
}

void Allocator::with_fixed_length(const std::function<void(std::uint64_t)> &task) {
    const Lock guard(length_mutex_);
    task(end());
}

// --- growing ------------------------------------------------------------------------------------------------------

std::uint64_t Allocator::covered_end() const {
    std::uint64_t region = end() / refcounts_.region_clusters();
    while (refcounts_.linked(region))
        ++region;
    return region * refcounts_.region_clusters();
}

/// Clusters are handed out of the region that growth continues: its free map must not be read after that.
void Allocator::load_last_region() {
    const std::uint64_t last = end() - 1;
    if (refcounts_.linked(last / refcounts_.region_clusters()))
        load_region(last / refcounts_.region_clusters());
}

bool Allocator::grow(std::uint64_t count) {
    load_last_region();
    const Lock length_guard(length_mutex_);
    const std::uint64_t old_end = end();
    const std::uint64_t covered = covered_end();
    short_of_room_.store(covered < old_end + count, std::memory_order_relaxed);
    if (covered < old_end + count)
        return false;
    const std::uint64_t step = std::max(count, growth_bytes / geometry_.cluster_size());
    const std::uint64_t new_end = std::min(old_end + step, covered);
    file_.truncate(geometry_.bytes(new_end));
    const Lock guard(mutex_);
    resize_maps(new_end);
    const std::uint64_t first_region = old_end / refcounts_.region_clusters();
    // A region that begins at or beyond the old end has nothing in it but what is handed out from here on.
    for (std::uint64_t r = first_region; r < loaded_.size(); ++r)
        if (r * refcounts_.region_clusters() >= old_end)
            loaded_[r] = true;
    for (std::uint64_t c = old_end; c < new_end; ++c)
        add_free(c, true);
    return true;
}

void Allocator::claim_beyond(HostCluster first, std::uint64_t count) {
    load_last_region();
    const Lock length_guard(length_mutex_);
    const std::uint64_t old_end = end();
    const std::uint64_t new_end = std::max(old_end, first.value + count);
    file_.truncate(geometry_.bytes(new_end));
    const Lock guard(mutex_);
    resize_maps(new_end);
    for (std::uint64_t r = old_end / refcounts_.region_clusters(); r < loaded_.size(); ++r)
        if (r * refcounts_.region_clusters() >= old_end)
            loaded_[r] = true;
    for (std::uint64_t c = old_end; c < first.value; ++c)
        add_free(c, true);
    note({first, count});
}

void Allocator::unclaim_beyond(HostRun claimed) {
    const Lock length_guard(length_mutex_);
    if (end() != claimed.end().value)
        return;
    file_.truncate(geometry_.bytes(claimed.first.value));
    const Lock guard(mutex_);
    resize_maps(claimed.first.value);
}

// --- the free map -------------------------------------------------------------------------------------------------

void Allocator::load_region(std::uint64_t region) {
    const Lock load_guard(load_mutex_);
    const std::uint64_t first = region * refcounts_.region_clusters();
    {
        const Lock guard(mutex_);
        if (region >= loaded_.size() || loaded_[region] || !refcounts_.linked(region))
            return;
    }
    if (known_metadata_.empty()) {
        known_metadata_.resize(1, true); // the header
        in_use_([this](HostRun run) {
            if (known_metadata_.size() < run.end().value)
                known_metadata_.resize(run.end().value);
            std::fill_n(known_metadata_.begin() + static_cast<std::ptrdiff_t>(run.first.value), run.count, true);
        });
    }
    // No cluster of this region has been handed out, and none has had its count lowered, by this process: the file
    // tells the whole truth about it.
    std::vector<std::uint64_t> free;
    refcounts_.read_block(region, [&](std::uint64_t i, std::uint64_t count) {
        const std::uint64_t c = first + i;
        if (count == 0 && c < end() && !(c < known_metadata_.size() && known_metadata_[c]))
            free.push_back(c);
    });
    const Lock guard(mutex_);
    loaded_[region] = true;
    while (next_unloaded_ < loaded_.size() && loaded_[next_unloaded_])
        ++next_unloaded_;
    for (const std::uint64_t c : free)
        if (c < end_ && !free_.get(c)) // growth may have filled the upper part already
            add_free(c, false);
}

void Allocator::load_all() {
    for (;;) {
        std::optional<std::uint64_t> region;
        {
            const Lock guard(mutex_);
            region = unloaded_region();
        }
        if (!region)
            return;
        load_region(*region);
    }
}

void Allocator::load_regions_of(const std::vector<HostRun> &runs) {
    for (const HostRun &run : runs)
        for (std::uint64_t r = refcounts_.region_of(run.first); r <= refcounts_.region_of(run.end() - 1); ++r)
            load_region(r);
}

Allocator::Counts Allocator::counts() const {
    const Lock guard(mutex_);
    return {end_, free_count_, punching_, retired_.load(std::memory_order_relaxed), !unloaded_region()};
}

std::uint64_t Allocator::uncounted_in_use(std::uint64_t region) const {
    if (nobodys_.load(std::memory_order_acquire))
        return 0;
    const std::uint64_t stop = end(), region_clusters = refcounts_.region_clusters();
    return std::min(stop - std::min(stop, region * region_clusters), region_clusters);
}

std::uint64_t Allocator::uncounted() const {
    const std::uint64_t stop = end(), region_clusters = refcounts_.region_clusters();
    std::uint64_t n = 0;
    if (!nobodys_.load(std::memory_order_acquire))
        return n;
    for (std::uint64_t r = 0; r * region_clusters < stop; ++r)
        if (!refcounts_.linked(r))
            n += std::min(region_clusters, stop - r * region_clusters);
    return n;
}

bool Allocator::ends_without_block() const { return !refcounts_.linked((end() - 1) / refcounts_.region_clusters()); }

bool Allocator::ends_uncounted() const { return nobodys_.load(std::memory_order_acquire) && ends_without_block(); }

std::uint64_t Allocator::waiting_to_punch_bytes() const {
    const Lock guard(mutex_);
    return geometry_.bytes(queued_);
}

HostCluster Allocator::highest_in_use(HostCluster from) const {
    const Lock guard(mutex_);
    std::uint64_t c = end_;
    while (c > from.value && free_.get(c - 1))
        --c;
    return {std::max(c, from.value)};
}

std::uint64_t Allocator::free_below(HostCluster limit) const {
    const Lock guard(mutex_);
    const std::uint64_t stop = std::min(limit.value, end());
    std::uint64_t n = 0;
    for (std::uint64_t w = 0; w < divide_up(stop, 64); ++w) {
        std::uint64_t word = free_.word(w);
        if (w == stop / 64)
            word &= (std::uint64_t{1} << (stop % 64)) - 1;
        n += static_cast<std::uint64_t>(std::popcount(word));
    }
    return n;
}

bool Allocator::is_free(HostCluster c) const {
    const Lock guard(mutex_);
    return c.value >= end_ || free_.get(c.value);
}

// --- watching -----------------------------------------------------------------------------------------------------

Allocator::Watch::Watch(Allocator &allocator) : allocator_(allocator) {
    const Lock guard(allocator_.mutex_);
    touched_.resize(allocator_.reserved_.words() * 64);
    for (std::uint64_t w = 0; w < allocator_.reserved_.words(); ++w)
        for (std::uint64_t word = allocator_.reserved_.word(w); word != 0; word &= word - 1)
            touched_[w * 64 + static_cast<std::uint64_t>(std::countr_zero(word))] = true;
    allocator_.watches_.push_back(this);
}

Allocator::Watch::~Watch() {
    const Lock guard(allocator_.mutex_);
    std::erase(allocator_.watches_, this);
}

std::vector<bool> Allocator::Watch::touched() const {
    const Lock guard(allocator_.mutex_);
    return touched_;
}

bool Allocator::Watch::touched(HostCluster c) const {
    const Lock guard(allocator_.mutex_);
    return c.value < touched_.size() && touched_[c.value];
}

} // namespace qlean
