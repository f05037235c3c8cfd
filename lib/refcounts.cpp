// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "refcounts.h"

#include "byte_order.h"
#include "error.h"

#include <mutex>
#include <shared_mutex>

namespace qlean {

namespace {

constexpr std::uint64_t max_slice_bytes = 4096;
constexpr std::size_t max_clean_slices = 1024;
constexpr std::uint64_t block_mask = ~std::uint64_t{0x1ff};

} // namespace

Refcounts::Refcounts(const Geometry &geometry, File &file, std::vector<std::uint64_t> table, HostOffset home)
    : geometry_(geometry), file_(file), slice_bytes_(std::min(geometry.cluster_size(), max_slice_bytes)),
      table_(std::move(table)), home_(home), first_regions_(table_.size()), asked_(first_regions_),
      shared_(first_regions_ * geometry.refcounts_per_block()) {
    for (std::size_t i = 0; i < table_.size(); ++i) {
        const std::uint64_t word = big_endian(table_[i]);
        if ((word & ~block_mask) != 0 || word % geometry_.cluster_size() != 0)
            throw_bad_image("'{}' is damaged: entry {} of its refcount table is {:#x}, not a cluster boundary; "
                            "see 'qemu-img check'",
                            file_.name(), i, word);
        table_[i] = word;
    }
}

bool Refcounts::linked(std::uint64_t region) const {
    const std::shared_lock guard(home_lock_);
    return region < table_.size() && table_[region] != 0;
}

void Refcounts::read_block(std::uint64_t region, const std::function<void(std::uint64_t, std::uint64_t)> &each) {
    std::vector<std::byte> bytes(geometry_.cluster_size());
    {
        const std::shared_lock guard(home_lock_);
        if (region >= table_.size() || table_[region] == 0)
            return;
        file_.read(bytes, HostOffset{table_.at(region)});
    }
    const RefcountView view(bytes, geometry_.refcount_order());
    for (std::size_t i = 0; i < view.size(); ++i)
        each(i, view.get(i));
}

bool Refcounts::was_shared(HostCluster c) {
    const std::uint64_t region = region_of(c);
    if (region >= first_regions_)
        return false;
    if (!asked_.has(region)) {
        read_block(region, [&](std::uint64_t i, std::uint64_t count) {
            if (count > 1)
                shared_.set(region * region_clusters() + i);
        });
        asked_.set(region);
    }
    return shared_.has(c.value);
}

void Refcounts::throw_unlinked(HostCluster c) const {
    throw_bad_image("'{}' is damaged: host cluster {} has no refcount block; see 'qemu-img check'", file_.name(),
                    c.value);
}

HostOffset Refcounts::slice_home(std::uint64_t key) const {
    const std::uint64_t first = key * slice_counts();
    const std::uint64_t region = first / region_clusters();
    if (region >= table_.size() || table_[region] == 0)
        throw_unlinked({first});
    return HostOffset{table_[region]} + (first % region_clusters() << geometry_.refcount_order()) / 8;
}

Refcounts::Slice &Refcounts::slice(HostCluster c) {
    const std::uint64_t key = c.value / slice_counts();
    const auto found = slices_.find(key);
    if (found != slices_.end())
        return found->second;
    Slice fresh{std::vector<std::byte>(slice_bytes_), false};
    file_.read(fresh.bytes, slice_home(key));
    return slices_.emplace(key, std::move(fresh)).first->second;
}

void Refcounts::mark_dirty(Slice &slice) {
    if (!slice.dirty)
        ++dirty_count_;
    slice.dirty = true;
}

std::uint64_t Refcounts::get(HostCluster c) {
    if (!(region_of(c) < table_.size() && table_[region_of(c)] != 0))
        return 0;
    return RefcountView(slice(c).bytes, geometry_.refcount_order()).get(c.value % slice_counts());
}

void Refcounts::increment(HostRun run) {
    const std::uint64_t max = RefcountView::max(geometry_.refcount_order());
    for (std::uint64_t i = 0; i < run.count; ++i)
        if (get(run.first + i) == max)
            throw_bad_image("'{}': the refcount of host cluster {} cannot exceed {}", file_.name(),
                            (run.first + i).value, max);
    for (std::uint64_t i = 0; i < run.count; ++i) {
        const HostCluster c = run.first + i;
        Slice &s = slice(c);
        RefcountView view(s.bytes, geometry_.refcount_order());
        view.set(c.value % slice_counts(), view.get(c.value % slice_counts()) + 1);
        mark_dirty(s);
    }
}

std::vector<HostRun> Refcounts::decrement(HostRun run, std::uint64_t times) {
    for (std::uint64_t i = 0; i < run.count; ++i)
        get(run.first + i); // loads, so that what follows cannot fail half-way
    std::vector<HostRun> freed;
    for (std::uint64_t i = 0; i < run.count; ++i) {
        const HostCluster c = run.first + i;
        const std::uint64_t count = get(c);
        if (count == 0)
            continue; // the image lied; the cluster stays out of use until the next open
        // Where it lied about its own metadata, one is the metadata's.
        const std::uint64_t lowest = guard_ != nullptr && guard_->has(c) ? 1 : 0;
        const std::uint64_t after = std::max(count - std::min(count, times), lowest);
        if (after == count)
            continue;
        Slice &s = slice(c);
        RefcountView view(s.bytes, geometry_.refcount_order());
        view.set(c.value % slice_counts(), after);
        mark_dirty(s);
        if (after <= 1) // also where the file still said 2 when it was asked
            shared_.clear(c.value);
        if (after == 0)
            append_run(freed, {c, 1});
    }
    return freed;
}

void Refcounts::write_dirty() {
    // Adjacent dirty slices of a block go out in one write.
    for (auto it = slices_.begin(); dirty_count_ != 0 && it != slices_.end();) {
        if (!it->second.dirty) {
            ++it;
            continue;
        }
        const HostOffset at = slice_home(it->first);
        std::vector<std::byte> bytes;
        const auto first = it;
        while (it != slices_.end() && it->second.dirty && slice_home(it->first) == at + bytes.size()) {
            bytes.insert(bytes.end(), it->second.bytes.begin(), it->second.bytes.end());
            ++it;
        }
        {
            const std::lock_guard guard(home_lock_);
            file_.write(bytes, at);
        }
        for (auto done = first; done != it; ++done) {
            done->second.dirty = false;
            --dirty_count_;
        }
    }
    if (slices_.size() > max_clean_slices)
        slices_.clear(); // all clean now, and the host's page cache still has them
}

HostOffset Refcounts::home() const {
    const std::shared_lock guard(home_lock_);
    return home_;
}

std::uint64_t Refcounts::table_entries() const {
    const std::shared_lock guard(home_lock_);
    return table_.size();
}

std::vector<std::pair<std::uint64_t, HostCluster>> Refcounts::blocks() const {
    const std::shared_lock guard(home_lock_);
    std::vector<std::pair<std::uint64_t, HostCluster>> found;
    for (std::size_t i = 0; i < table_.size(); ++i)
        if (table_[i] != 0)
            found.emplace_back(i, geometry_.cluster_of(HostOffset{table_[i]}));
    return found;
}

std::vector<std::uint64_t> Refcounts::table_words(std::uint64_t first, std::uint64_t count) const {
    std::vector<std::uint64_t> words(count);
    for (std::uint64_t i = 0; i < count && first + i < table_.size(); ++i)
        words[i] = big_endian(table_[first + i]);
    return words;
}

void Refcounts::set_block(std::uint64_t region, HostOffset block) {
    const std::lock_guard guard(home_lock_);
    if (block.value == 0) {
        // Nothing of a block that is gone may be written any more.
        for (auto it = slices_.begin(); it != slices_.end();) {
            if (it->first * slice_counts() / region_clusters() != region) {
                ++it;
                continue;
            }
            dirty_count_ -= it->second.dirty;
            it = slices_.erase(it);
        }
    }
    if (guard_ != nullptr) {
        if (table_[region] != 0)
            guard_->remove(HostOffset{table_[region]}, geometry_.cluster_size());
        if (block.value != 0)
            guard_->add(block, geometry_.cluster_size());
    }
    table_[region] = block.value;
}

void Refcounts::set_table(HostOffset home, std::uint64_t entries) {
    const std::lock_guard guard(home_lock_);
    if (guard_ != nullptr) {
        guard_->remove(home_, table_.size() * 8);
        guard_->add(home, entries * 8);
    }
    table_.resize(entries);
    home_ = home;
}

bool Refcounts::guard_with(MetadataGuard &guard) {
    guard_ = &guard;
    bool apart = guard.add(home_, table_.size() * 8);
    for (const std::uint64_t block : table_)
        if (block != 0)
            apart = guard.add(HostOffset{block}, geometry_.cluster_size()) && apart;
    return apart;
}

} // namespace qlean
