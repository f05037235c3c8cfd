// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "tests/fault/faulty_file.h"

#include "lib/error.h"

#include <chrono>
#include <cstring>

namespace qlean::fault {

const char *name_of(Op op) {
    static constexpr const char *names[] = {"read", "write", "sync", "truncate", "punch", "zero", "reserve", "share"};
    return names[static_cast<unsigned>(op)];
}

FaultyDisk::FaultyDisk(Bytes bytes) : bytes_(std::move(bytes)), data_(divide_up(bytes_.size(), sector), true) {}

Bytes FaultyDisk::bytes() const {
    const std::lock_guard guard(mutex_);
    return bytes_;
}

std::uint64_t FaultyDisk::length() const {
    const std::lock_guard guard(mutex_);
    return bytes_.size();
}

void FaultyDisk::record() {
    const std::lock_guard guard(mutex_);
    first_ = bytes_;
    events_.clear();
    recording_ = true;
}

std::size_t FaultyDisk::recorded() const {
    const std::lock_guard guard(mutex_);
    return events_.size();
}

void FaultyDisk::log(Event event) {
    if (recording_)
        events_.push_back(std::move(event));
}

// --- faults -------------------------------------------------------------------------------------------------------

void FaultyDisk::fail(Fault fault) {
    const std::lock_guard guard(mutex_);
    fault_ = std::move(fault);
    struck_ = false;
}

void FaultyDisk::heal() {
    const std::lock_guard guard(mutex_);
    fault_.reset();
}

bool FaultyDisk::struck() const {
    const std::lock_guard guard(mutex_);
    return struck_;
}

std::uint64_t FaultyDisk::count(unsigned ops) const {
    const std::lock_guard guard(mutex_);
    std::uint64_t n = 0;
    for (unsigned op = 0; op < op_count; ++op)
        n += ops >> op & 1 ? counts_[op] : 0;
    return n;
}

void FaultyDisk::start_cold(bool cold) {
    const std::lock_guard guard(mutex_);
    cold_ = cold;
    warmed_.clear();
}

void FaultyDisk::refuse_punch(bool refuse) {
    const std::lock_guard guard(mutex_);
    refuse_punch_ = refuse;
}

void FaultyDisk::refuse_zero(bool refuse) {
    const std::lock_guard guard(mutex_);
    refuse_zero_ = refuse;
}

void FaultyDisk::allow_share(bool allow) {
    const std::lock_guard guard(mutex_);
    allow_share_ = allow;
}

void FaultyDisk::maybe_fail(const Request &request, std::span<const std::byte> from) {
    if (truces_ != 0)
        return;
    ++counts_[static_cast<unsigned>(request.op)];
    if (!fault_ || !(fault_->ops & mask(request.op)) || (fault_->only && !fault_->only(request)))
        return;
    if (fault_->nth > 1) {
        --fault_->nth;
        return;
    }
    struck_ = true;
    const int code = fault_->code;
    if (fault_->partial > 0)
        store(request.at, from.first(std::min<std::uint64_t>(round_down(fault_->partial, sector), from.size())));
    if (!fault_->lasting)
        fault_.reset();
    throw_io(code, fmt::format("injected: {} of {} bytes at {:#x}", name_of(request.op), request.length, request.at));
}

// --- changes ------------------------------------------------------------------------------------------------------

void FaultyDisk::set_length(std::uint64_t length) {
    bytes_.resize(length);
    data_.resize(divide_up(length, sector));
    log({Event::Kind::length, false, length, 0, {}});
}

void FaultyDisk::store(std::uint64_t at, std::span<const std::byte> from) {
    if (from.empty())
        return;
    if (at + from.size() > bytes_.size())
        set_length(at + from.size());
    std::memcpy(bytes_.data() + at, from.data(), from.size());
    std::fill(data_.begin() + static_cast<std::ptrdiff_t>(at / sector),
              data_.begin() + static_cast<std::ptrdiff_t>(divide_up(at + from.size(), sector)), true);
    log({Event::Kind::write, false, at, from.size(), {from.begin(), from.end()}});
}

void FaultyDisk::store_zeroes(std::uint64_t at, std::uint64_t length, bool punch) {
    const std::uint64_t end = std::min<std::uint64_t>(at + length, bytes_.size());
    if (at >= end)
        return;
    std::memset(bytes_.data() + at, 0, end - at);
    const std::uint64_t first = divide_up(at, sector), last = end == bytes_.size() ? data_.size() : end / sector;
    if (punch && first < last)
        std::fill(data_.begin() + static_cast<std::ptrdiff_t>(first), data_.begin() + static_cast<std::ptrdiff_t>(last),
                  false);
    log({Event::Kind::zeroes, punch, at, end - at, {}});
}

// --- hooks --------------------------------------------------------------------------------------------------------

int FaultyDisk::add_hook(bool before, std::function<void(const Request &)> hook) {
    const std::lock_guard guard(mutex_);
    hooks_.push_back(std::make_shared<Hook>(Hook{++next_hook_, before, std::move(hook)}));
    ++hook_count_;
    return next_hook_;
}

void FaultyDisk::remove_hook(int number) {
    const std::lock_guard guard(mutex_);
    hook_count_ -= static_cast<int>(std::erase_if(hooks_, [&](const auto &h) { return h->number == number; }));
}

void FaultyDisk::run_hooks(bool before, const Request &request) {
    if (hook_count_ == 0)
        return;
    std::vector<std::shared_ptr<Hook>> called;
    {
        const std::lock_guard guard(mutex_);
        for (const auto &hook : hooks_)
            if (hook->before == before)
                called.push_back(hook);
    }
    for (const auto &hook : called)
        hook->call(request);
}

// --- the file -----------------------------------------------------------------------------------------------------

void FaultyFile::read(std::span<std::byte> into, HostOffset at) {
    const Request request{Op::read, at.value, into.size()};
    disk_->run_hooks(true, request);
    {
        const std::lock_guard guard(disk_->mutex_);
        disk_->maybe_fail(request, {});
        if (disk_->cold_)
            disk_->warmed_.emplace_back(at.value, at.value + into.size());
        const auto &bytes = disk_->bytes_;
        const std::uint64_t n =
            at.value < bytes.size() ? std::min<std::uint64_t>(into.size(), bytes.size() - at.value) : 0;
        if (n > 0)
            std::memcpy(into.data(), bytes.data() + at.value, n);
        std::fill(into.begin() + static_cast<std::ptrdiff_t>(n), into.end(), std::byte{0});
    }
    disk_->run_hooks(false, request);
}

bool FaultyFile::read_cached(std::span<std::byte> into, HostOffset at) {
    {
        const std::lock_guard guard(disk_->mutex_);
        if (disk_->cold_ && std::none_of(disk_->warmed_.begin(), disk_->warmed_.end(), [&](const auto &range) {
                return range.first <= at.value && at.value + into.size() <= range.second;
            }))
            return false;
    }
    read(into, at);
    return true;
}

void FaultyFile::write(std::span<const std::byte> from, HostOffset at) {
    const Request request{Op::write, at.value, from.size()};
    disk_->run_hooks(true, request);
    {
        const std::lock_guard guard(disk_->mutex_);
        disk_->maybe_fail(request, from);
        disk_->store(at.value, from);
    }
    disk_->run_hooks(false, request);
}

void FaultyFile::sync() {
    {
        const std::lock_guard guard(disk_->mutex_);
        disk_->log({Event::Kind::sync_began, false, 0, 0, {}});
    }
    const Request request{Op::sync, 0, 0};
    disk_->run_hooks(true, request);
    {
        const std::lock_guard guard(disk_->mutex_);
        try {
            disk_->maybe_fail(request, {});
        } catch (...) {
            disk_->log({Event::Kind::sync_failed, false, 0, 0, {}});
            throw;
        }
        disk_->log({Event::Kind::sync_ended, false, 0, 0, {}});
    }
    disk_->run_hooks(false, request);
}

void FaultyFile::truncate(std::uint64_t length) {
    const Request request{Op::truncate, length, 0};
    disk_->run_hooks(true, request);
    {
        const std::lock_guard guard(disk_->mutex_);
        disk_->maybe_fail(request, {});
        disk_->set_length(length);
    }
    disk_->run_hooks(false, request);
}

bool FaultyFile::give_zeroes(Op op, HostOffset at, std::uint64_t length) {
    const Request request{op, at.value, length};
    disk_->run_hooks(true, request);
    {
        const std::lock_guard guard(disk_->mutex_);
        if (op == Op::punch ? disk_->refuse_punch_ : disk_->refuse_zero_)
            return false;
        disk_->maybe_fail(request, {});
        disk_->store_zeroes(at.value, length, op == Op::punch);
    }
    disk_->run_hooks(false, request);
    return true;
}

bool FaultyFile::punch(HostOffset at, std::uint64_t length) { return give_zeroes(Op::punch, at, length); }

bool FaultyFile::zero_keeping_space(HostOffset at, std::uint64_t length) { return give_zeroes(Op::zero, at, length); }

void FaultyFile::reserve_space(HostOffset at, std::uint64_t length) {
    const Request request{Op::reserve, at.value, length};
    disk_->run_hooks(true, request);
    {
        const std::lock_guard guard(disk_->mutex_);
        disk_->maybe_fail(request, {});
    }
    disk_->run_hooks(false, request);
}

bool FaultyFile::share(HostOffset from, HostOffset to, std::uint64_t length) {
    const Request request{Op::share, to.value, length};
    {
        const std::lock_guard guard(disk_->mutex_);
        if (!disk_->allow_share_ || from.value + length > disk_->bytes_.size())
            return false;
    }
    disk_->run_hooks(true, request);
    {
        const std::lock_guard guard(disk_->mutex_);
        const auto first = disk_->bytes_.begin() + static_cast<std::ptrdiff_t>(from.value);
        const Bytes bytes(first, first + static_cast<std::ptrdiff_t>(length));
        disk_->maybe_fail(request, bytes);
        disk_->store(to.value, bytes);
    }
    disk_->run_hooks(false, request);
    return true;
}

std::uint64_t FaultyFile::allocated() {
    const std::lock_guard guard(disk_->mutex_);
    return static_cast<std::uint64_t>(std::count(disk_->data_.begin(), disk_->data_.end(), true)) * FaultyDisk::sector;
}

std::optional<HostOffset> FaultyFile::next_data(HostOffset at) {
    const std::lock_guard guard(disk_->mutex_);
    for (std::uint64_t s = at.value / FaultyDisk::sector; s < disk_->data_.size(); ++s)
        if (disk_->data_[s])
            return HostOffset{std::max(at.value, s * FaultyDisk::sector)};
    return std::nullopt;
}

// --- breakpoints --------------------------------------------------------------------------------------------------

Breakpoint::Breakpoint(std::shared_ptr<FaultyDisk> disk, When when, Filter select) : disk_(std::move(disk)) {
    hook_ = disk_->add_hook(when == When::before, [this, select = std::move(select)](const Request &request) {
        std::unique_lock guard(mutex_);
        if (hit_ || released_ || !select(request))
            return;
        hit_ = true;
        ++inside_;
        changed_.notify_all();
        changed_.wait(guard, [&] { return released_; });
        --inside_;
        changed_.notify_all();
    });
}

Breakpoint::~Breakpoint() {
    disk_->remove_hook(hook_);
    std::unique_lock guard(mutex_);
    released_ = true;
    changed_.notify_all();
    changed_.wait(guard, [&] { return inside_ == 0; });
}

bool Breakpoint::wait() {
    std::unique_lock guard(mutex_);
    return changed_.wait_for(guard, std::chrono::seconds(10), [&] { return hit_; });
}

bool Breakpoint::hit() const {
    const std::lock_guard guard(mutex_);
    return hit_;
}

void Breakpoint::release() {
    const std::lock_guard guard(mutex_);
    released_ = true;
    changed_.notify_all();
}

} // namespace qlean::fault
