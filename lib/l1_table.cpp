// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "l1_table.h"

#include "byte_order.h"

namespace qlean {

L1Table::L1Table(std::vector<std::uint64_t> words, HostOffset home)
    : size_(words.size()), entries_(std::make_unique<std::atomic<std::uint64_t>[]>(words.size())),
      locks_(std::make_unique<PaddedLock[]>(lock_count)), home_(home), dirty_(divide_up(words.size(), sector_words)) {
    for (std::size_t i = 0; i < words.size(); ++i)
        entries_[i].store(big_endian(words[i]), std::memory_order_relaxed);
}

bool L1Table::guard_with(MetadataGuard &guard, std::uint64_t table_bytes) {
    guard_ = &guard;
    table_bytes_ = table_bytes;
    bool apart = guard.add(home(), size_ * 8);
    for (std::uint64_t i = 0; i < size_; ++i)
        if (const HostOffset at = table(i); at.value != 0)
            apart = guard.add(at, table_bytes) && apart;
    return apart;
}

void L1Table::set_home(HostOffset home) {
    const HostOffset old = home_.exchange(home, std::memory_order_acq_rel);
    if (guard_ == nullptr)
        return;
    guard_->remove(old, size_ * 8);
    guard_->add(home, size_ * 8);
}

void L1Table::set(std::uint64_t i, std::uint64_t word) {
    if (guard_ != nullptr) {
        const HostOffset before = table(i), after = entry::table(word);
        if (before.value != 0 && before != after)
            guard_->remove(before, table_bytes_);
        if (after.value != 0)
            guard_->add(after, table_bytes_);
    }
    entries_[i].store(word, std::memory_order_release);
    auto dirty = dirty_[i / sector_words];
    if (!dirty) {
        dirty = true;
        dirty_count_.fetch_add(1, std::memory_order_release);
    }
}

void L1Table::link_new(std::uint64_t i, HostOffset table) {
    // In one step: a leader that finds the table among the new ones finds its address too.
    const Lock guard(mutex_);
    new_.insert(i);
    set(i, entry::data(table));
}

void L1Table::relink(std::uint64_t i, HostOffset table) {
    const Lock guard(mutex_);
    new_.erase(i);
    set(i, entry::data(table));
}

void L1Table::relink_shared(std::uint64_t i, HostOffset table) {
    const Lock guard(mutex_);
    set(i, table.value);
}

void L1Table::set_copied(std::uint64_t i) {
    const Lock guard(mutex_);
    set(i, word(i) | entry::copied);
}

void L1Table::unlink(std::uint64_t i) {
    const Lock guard(mutex_);
    new_.erase(i);
    set(i, 0);
}

bool L1Table::is_new(std::uint64_t i) const {
    const Lock guard(mutex_);
    return new_.contains(i);
}

std::vector<std::uint64_t> L1Table::new_tables() const {
    const Lock guard(mutex_);
    return {new_.begin(), new_.end()};
}

void L1Table::written(std::uint64_t i) {
    const Lock guard(mutex_);
    new_.erase(i);
}

std::vector<L1Table::DirtyRun> L1Table::take_dirty() {
    std::vector<DirtyRun> runs;
    if (!dirty())
        return runs;
    const Lock guard(mutex_);
    for (std::uint64_t sector = 0; sector < dirty_.size(); ++sector) {
        if (!dirty_[sector])
            continue;
        dirty_[sector] = false;
        const std::uint64_t first = sector * sector_words, end = std::min(first + sector_words, size_);
        if (runs.empty() || runs.back().first_sector + divide_up(runs.back().words.size(), sector_words) != sector)
            runs.push_back({sector, home() + first * 8, {}});
        for (std::uint64_t i = first; i < end; ++i)
            runs.back().words.push_back(big_endian(entries_[i].load(std::memory_order_acquire)));
    }
    dirty_count_.store(0, std::memory_order_release);
    return runs;
}

void L1Table::put_back(const std::vector<DirtyRun> &runs) {
    const Lock guard(mutex_);
    for (const auto &run : runs)
        for (std::uint64_t s = 0; s < divide_up(run.words.size(), sector_words); ++s)
            if (!dirty_[run.first_sector + s]) {
                dirty_[run.first_sector + s] = true;
                dirty_count_.fetch_add(1, std::memory_order_release);
            }
}

} // namespace qlean
