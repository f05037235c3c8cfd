// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "uncommitted.h"

#include "../at_work.h"

#include <algorithm>

namespace qlean {

namespace {

/// So much of the limit is worth a commit. Less, and there are many; more, and who moves has to wait for one.
constexpr std::uint64_t worth_thirds = 2;

} // namespace

// --- a move -------------------------------------------------------------------------------------------------------

Uncommitted::Share Uncommitted::take(std::uint64_t bytes, std::uint64_t limit) {
    limit = std::max(limit, bytes);
    Lock lock(mutex_);
    limit_ = limit;
    if (!thread_.joinable())
        thread_ = std::thread([this] { keep_returning(); });
    ++waiting_;
    if (taken_ + bytes > limit)
        changed_.notify_all();
    while (taken_ + bytes > limit && !failure_)
        lock.wait(changed_);
    --waiting_;
    if (failure_) {
        const auto failure = std::exchange(failure_, nullptr);
        changed_.notify_all();
        std::rethrow_exception(failure);
    }
    taken_ += bytes;
    return {*this, bytes};
}

Uncommitted::Share::~Share() {
    if (owner_)
        owner_->change(bytes_, 0);
}

void Uncommitted::Share::moved() { std::exchange(owner_, nullptr)->change(0, bytes_); }

void Uncommitted::change(std::uint64_t dropped, std::uint64_t moved) {
    const Lock lock(mutex_);
    taken_ -= dropped;
    moved_ += moved;
    changed_.notify_all();
}

bool Uncommitted::any_moved() const {
    const Lock lock(mutex_);
    return moved_ != 0;
}

// --- giving back --------------------------------------------------------------------------------------------------

Uncommitted::Return::Return(Uncommitted &owner) : owner_(owner) {
    Lock lock(owner.mutex_);
    ++owner.queued_;
    while (owner.returning_)
        lock.wait(owner.changed_);
    --owner.queued_;
    owner.returning_ = true;
    bytes_ = owner.moved_;
}

Uncommitted::Return::~Return() {
    const Lock lock(owner_.mutex_);
    if (done_) {
        owner_.moved_ -= bytes_;
        owner_.taken_ -= bytes_;
    }
    if (done_ || failure_)
        owner_.failure_ = failure_;
    owner_.returning_ = false;
    owner_.changed_.notify_all();
}

/// A little is, for whoever waits for room.
bool Uncommitted::worth_returning() const {
    return moved_ != 0 && !failure_ && (waiting_ != 0 || moved_ >= limit_ / 3 * worth_thirds);
}

void Uncommitted::keep_returning() {
    const AtWork working;
    Lock lock(mutex_);
    for (;;) {
        while (!stops_ && (returning_ || queued_ != 0 || !worth_returning()))
            lock.wait(changed_);
        if (stops_)
            return;
        lock.unlock();
        {
            Return returning(*this);
            try {
                give_back_();
                returning.done();
            } catch (...) {
                returning.failed(std::current_exception());
            }
        }
        lock.lock();
    }
}

void Uncommitted::stop() {
    {
        const Lock lock(mutex_);
        stops_ = true;
    }
    changed_.notify_all();
    if (thread_.joinable())
        thread_.join();
}

} // namespace qlean
