// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "l2_cache.h"

#include "byte_order.h"
#include "error.h"

#include <algorithm>
#include <shared_mutex>
#include <sys/mman.h>

namespace qlean {

namespace {

constexpr std::uint64_t max_slice_words = 512;

} // namespace

std::uint64_t L2Cache::slice_entries(const Geometry &geometry) {
    return std::min(geometry.l2_entries(), max_slice_words / geometry.entry_words());
}

std::uint64_t L2Cache::slice_count(const Geometry &geometry) {
    return divide_up(geometry.guest_clusters(), slice_entries(geometry));
}

L2Cache::L2Cache(const Geometry &geometry, File &file, const SyncLog &syncs, L1Table &l1, std::uint64_t limit,
                 Claims *claims)
    : geometry_(geometry), file_(file), syncs_(syncs), l1_(l1), claims_(claims), entry_words_(geometry.entry_words()),
      slice_entries_(slice_entries(geometry)), keys_(slice_count(geometry)),
      shard_limit_(std::max<std::uint64_t>(limit / slice_bytes() / shard_count, 4)) {
    // Untouched pages of the directory cost nothing, so opening does not grow with the image.
    const std::size_t bytes = std::max<std::uint64_t>(keys_, 1) * sizeof(*directory_);
    void *memory = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        throw_io(errno, fmt::format("no memory for the directory of {} L2 slices of '{}'", keys_, file.name()));
    directory_ = static_cast<std::atomic<Slice *> *>(memory);
}

L2Cache::~L2Cache() { ::munmap(directory_, std::max<std::uint64_t>(keys_, 1) * sizeof(*directory_)); }

HostOffset L2Cache::home(std::uint64_t key) const {
    return l1_.table(table_of_slice(key)) + key % slices_per_table() * slice_bytes();
}

L2Words L2Cache::entry_of(const Slice &slice, std::uint64_t i) const {
    if (entry_words_ == 1)
        return {slice.words[i].load(std::memory_order_acquire), 0};
    return extended_entry_of(slice, i);
}

/// Both words as one store() left them.
L2Words L2Cache::extended_entry_of(const Slice &slice, std::uint64_t i) {
    const auto both = [&] {
        const std::uint64_t entry = slice.words[2 * i].load(std::memory_order_acquire);
        return L2Words{entry, slice.words[2 * i + 1].load(std::memory_order_acquire)};
    };
    for (int attempt = 0; attempt < 8; ++attempt) {
        const std::uint64_t before = slice.stores.load(std::memory_order_acquire);
        const L2Words words = both();
        // Whoever has seen one new word sees that its store has begun.
        if (before % 2 == 0 && slice.stores.load(std::memory_order_relaxed) == before)
            return words;
    }
    const Lock guard(slice.mutex);
    return both();
}

bool L2Cache::peek(std::uint64_t key, std::uint64_t first, std::span<L2Words> out) {
    if (key >= keys_)
        return false; // beyond the disk: never cached, never changed
    Slice *slice = directory_[key].load(std::memory_order_acquire);
    if (slice == nullptr)
        return false;
    const std::uint64_t turn = slice->turn.load(std::memory_order_acquire);
    if (slice->key.load(std::memory_order_acquire) != key)
        return false;
    for (std::size_t i = 0; i < out.size(); ++i)
        out[i] = entry_of(*slice, first + i);
    // Giving a slice up raises its turn before a word of it changes: an unchanged turn vouches for all that was read.
    if (slice->turn.load(std::memory_order_acquire) != turn)
        return false;
    if (!slice->used.load(std::memory_order_relaxed))
        slice->used.store(true, std::memory_order_relaxed);
    return true;
}

void L2Cache::read(GuestCluster first, std::span<L2Words> out) {
    while (!out.empty()) {
        const std::uint64_t key = slice_of(first), at = first.value % slice_entries_;
        const auto piece = out.first(std::min<std::uint64_t>(out.size(), slice_entries_ - at));
        if (!peek(key, at, piece)) {
            const std::uint64_t table = table_of_slice(key);
            const std::shared_lock guard(l1_.lock(table));
            if (l1_.table(table).value == 0) {
                std::fill(piece.begin(), piece.end(), L2Words{});
            } else {
                Slice *slice = load(key);
                for (std::size_t i = 0; i < piece.size(); ++i)
                    piece[i] = entry_of(*slice, at + i);
                slice->pins.fetch_sub(1, std::memory_order_release);
            }
        }
        out = out.subspan(piece.size());
        first += piece.size();
    }
}

void L2Cache::read_around(GuestCluster first, std::span<L2Words> out) {
    while (!out.empty()) {
        const std::uint64_t key = slice_of(first), at = first.value % slice_entries_;
        const auto piece = out.first(std::min<std::uint64_t>(out.size(), slice_entries_ - at));
        if (!peek(key, at, piece)) {
            const std::uint64_t table = table_of_slice(key);
            const std::shared_lock guard(l1_.lock(table));
            if (l1_.table(table).value == 0)
                std::fill(piece.begin(), piece.end(), L2Words{});
            else if (!peek(key, at, piece)) {
                // Not in memory, so the file has it, unless the table is too new to be there. A slice that is
                // loaded, changed and written while this reads yields its words from before or after the change.
                std::vector<std::uint64_t> words(slice_words());
                fill_from_file(key, words);
                // The two words of an extended entry may be of different moments then, but memory has them.
                if (entry_words_ == 1 || !peek(key, at, piece))
                    for (std::size_t i = 0; i < piece.size(); ++i)
                        piece[i] = entry_words_ == 1 ? L2Words{words[at + i], 0}
                                                     : L2Words{words[2 * (at + i)], words[2 * (at + i) + 1]};
            }
        }
        out = out.subspan(piece.size());
        first += piece.size();
    }
}

void L2Cache::fill_from_file(std::uint64_t key, std::span<std::uint64_t> words) {
    if (l1_.is_new(table_of_slice(key))) {
        std::fill(words.begin(), words.end(), 0);
        return;
    }
    file_.read(std::as_writable_bytes(words), home(key));
    for (auto &word : words)
        word = big_endian(word);
}

/// With the shard's mutex held.
void L2Cache::give_up(Slice &slice) {
    directory_[slice.key.load(std::memory_order_relaxed)].store(nullptr, std::memory_order_release);
    slice.key.store(no_key, std::memory_order_release);
    slice.turn.fetch_add(1, std::memory_order_seq_cst);
}

L2Cache::Slice *L2Cache::take_free(Shard &shard) {
    if (!shard.free.empty()) {
        Slice *slice = shard.free.back();
        shard.free.pop_back();
        return slice;
    }
    if (shard.slices.size() >= shard_limit_) {
        for (std::size_t step = 0; step < 2 * shard.slices.size(); ++step) {
            Slice &slice = *shard.slices[shard.hand];
            shard.hand = (shard.hand + 1) % shard.slices.size();
            if (slice.pins.load(std::memory_order_acquire) != 0 || slice.dirty.load(std::memory_order_acquire))
                continue;
            const std::uint64_t key = slice.key.load(std::memory_order_relaxed);
            if (key == no_key || slice.used.exchange(false, std::memory_order_relaxed))
                continue;
            give_up(slice);
            return &slice;
        }
    }
    auto slice = std::make_unique<Slice>();
    slice->words = std::make_unique<std::atomic<std::uint64_t>[]>(slice_words());
    shard.slices.push_back(std::move(slice));
    slices_made_.fetch_add(1, std::memory_order_relaxed);
    return shard.slices.back().get();
}

L2Cache::Slice *L2Cache::load(std::uint64_t key) {
    Shard &s = shard(key);
    Lock guard(s.mutex);
    for (;;) {
        if (Slice *slice = directory_[key].load(std::memory_order_acquire)) {
            slice->pins.fetch_add(1, std::memory_order_relaxed);
            slice->used.store(true, std::memory_order_relaxed);
            return slice;
        }
        if (std::find(s.loading.begin(), s.loading.end(), key) == s.loading.end())
            break;
        guard.wait(s.loaded);
    }
    Slice *slice = take_free(s);
    // Pinned before it has a key, so that the clock passes it by while it is filled.
    slice->pins.fetch_add(1, std::memory_order_relaxed);
    s.loading.push_back(key);
    guard.unlock();
    std::vector<std::uint64_t> words(slice_words());
    std::exception_ptr error;
    try {
        fill_from_file(key, words);
        if (claims_ != nullptr)
            claims_->read(key, words);
    } catch (...) {
        error = std::current_exception();
    }
    guard.lock();
    std::erase(s.loading, key);
    s.loaded.notify_all();
    if (error) {
        slice->pins.fetch_sub(1, std::memory_order_relaxed);
        s.free.push_back(slice);
        std::rethrow_exception(error);
    }
    for (std::size_t i = 0; i < words.size(); ++i)
        slice->words[i].store(words[i], std::memory_order_release);
    slice->needs = 0;
    slice->used.store(true, std::memory_order_relaxed);
    slice->key.store(key, std::memory_order_release);
    directory_[key].store(slice, std::memory_order_release);
    return slice;
}

L2Cache::Pin L2Cache::pin(std::uint64_t slice) { return {this, load(slice)}; }

L2Cache::Pin &L2Cache::Pin::operator=(Pin &&other) noexcept {
    std::swap(cache_, other.cache_);
    std::swap(slice_, other.slice_);
    return *this;
}

L2Cache::Pin::~Pin() {
    if (slice_ != nullptr)
        slice_->pins.fetch_sub(1, std::memory_order_release);
}

void L2Cache::Pin::store(GuestCluster c, const L2Words &words) {
    const Lock guard(slice_->mutex);
    const std::uint64_t at = c.value % cache_->slice_entries_ * cache_->entry_words_;
    if (cache_->entry_words_ == 2) {
        const std::uint64_t stores = slice_->stores.load(std::memory_order_relaxed);
        slice_->stores.store(stores + 1, std::memory_order_relaxed);
        slice_->words[at].store(words.entry, std::memory_order_release);
        slice_->words[at + 1].store(words.bitmap, std::memory_order_release);
        slice_->stores.store(stores + 2, std::memory_order_release);
    } else {
        slice_->words[at].store(words.entry, std::memory_order_release);
    }
    slice_->needs = std::max(slice_->needs, cache_->syncs_.needs());
    cache_->mark_dirty(*slice_);
}

L2Words L2Cache::Pin::load(GuestCluster c) const { return cache_->entry_of(*slice_, c.value % cache_->slice_entries_); }

void L2Cache::mark_dirty(Slice &slice) {
    if (slice.dirty.exchange(true, std::memory_order_acq_rel))
        return;
    dirty_slices_.fetch_add(1, std::memory_order_relaxed);
    Shard &s = shard(slice.key.load(std::memory_order_relaxed));
    const Lock guard(s.mutex);
    s.dirty.push_back(&slice);
}

L2Cache::Slice *L2Cache::pin_if_present(std::uint64_t key) {
    const Lock guard(shard(key).mutex);
    Slice *slice = directory_[key].load(std::memory_order_acquire);
    if (slice != nullptr)
        slice->pins.fetch_add(1, std::memory_order_relaxed);
    return slice;
}

/// Copies a pinned slice; if that cleans it, the pin passes to `copy`, else it is given back.
void L2Cache::copy_slice(Slice &slice, std::uint64_t *to, Copy &copy, std::uint64_t &cleared) {
    bool was_dirty;
    {
        const Lock guard(slice.mutex);
        for (std::size_t i = 0; i < slice_words(); ++i)
            to[i] = big_endian(slice.words[i].load(std::memory_order_acquire));
        // Asked while nothing can be stored: a table that was shared may get a home of its own, and what is stored
        // after that must not reach the old one.
        if (!copy.whole_new_table)
            copy.at = home(slice.key.load(std::memory_order_acquire));
        copy.needs = std::max(copy.needs, std::exchange(slice.needs, 0));
        was_dirty = slice.dirty.exchange(false, std::memory_order_acq_rel);
    }
    if (was_dirty) {
        copy.slices.push_back(&slice);
        ++cleared;
    } else {
        slice.pins.fetch_sub(1, std::memory_order_release);
    }
}

std::vector<L2Cache::Copy> L2Cache::take_dirty() {
    std::vector<Slice *> dirty;
    for (Shard &s : shards_) {
        const Lock guard(s.mutex);
        for (Slice *slice : s.dirty) {
            slice->pins.fetch_add(1, std::memory_order_relaxed);
            dirty.push_back(slice);
        }
        s.dirty.clear();
    }
    std::vector<Copy> copies;
    std::uint64_t cleared = 0;
    std::vector<std::uint64_t> copied_whole;
    const auto copy_whole = [&](std::uint64_t table) {
        Copy copy;
        copy.at = l1_.table(table);
        copy.words.resize(geometry_.cluster_size() / 8);
        copy.whole_new_table = true;
        copy.table = table;
        for (std::uint64_t i = 0; i < slices_per_table(); ++i) {
            const std::uint64_t key = table * slices_per_table() + i;
            if (key >= keys_)
                break;
            if (Slice *slice = pin_if_present(key))
                copy_slice(*slice, copy.words.data() + i * slice_words(), copy, cleared);
        }
        copied_whole.push_back(table);
        copies.push_back(std::move(copy));
    };
    for (Slice *slice : dirty) {
        if (slice->dirty.load(std::memory_order_acquire)) {
            const std::uint64_t key = slice->key.load(std::memory_order_acquire);
            const std::uint64_t table = table_of_slice(key);
            // A new table must reach the file whole before a slice of it may leave memory.
            if (l1_.is_new(table)) {
                copy_whole(table);
            } else {
                Copy copy;
                copy.words.resize(slice_words());
                copy.table = table;
                slice->pins.fetch_add(1, std::memory_order_relaxed);
                copy_slice(*slice, copy.words.data(), copy, cleared);
                if (!copy.slices.empty())
                    copies.push_back(std::move(copy));
            }
        }
        slice->pins.fetch_sub(1, std::memory_order_release);
    }
    for (const std::uint64_t table : l1_.new_tables())
        if (std::find(copied_whole.begin(), copied_whole.end(), table) == copied_whole.end())
            copy_whole(table);
    dirty_slices_.fetch_sub(cleared, std::memory_order_relaxed);
    return copies;
}

void L2Cache::done(const Copy &copy) {
    if (copy.whole_new_table)
        l1_.written(copy.table);
    for (Slice *slice : copy.slices)
        slice->pins.fetch_sub(1, std::memory_order_release);
}

void L2Cache::failed(const Copy &copy) {
    for (Slice *slice : copy.slices) {
        {
            const Lock guard(slice->mutex);
            slice->needs = std::max(slice->needs, copy.needs);
            mark_dirty(*slice);
        }
        slice->pins.fetch_sub(1, std::memory_order_release);
    }
}

std::vector<std::uint64_t> L2Cache::whole_table(std::uint64_t i) {
    // Pinned before the file is read: what is not in memory now has reached the file.
    std::vector<std::pair<std::uint64_t, Pin>> present;
    for (std::uint64_t n = 0; n < slices_per_table() && i * slices_per_table() + n < keys_; ++n)
        if (Slice *slice = pin_if_present(i * slices_per_table() + n))
            present.emplace_back(n * slice_words(), Pin(this, slice));
    std::vector<std::uint64_t> words(geometry_.cluster_size() / 8);
    if (!l1_.is_new(i))
        file_.read(std::as_writable_bytes(std::span(words)), l1_.table(i));
    for (const auto &[at, pin] : present)
        for (std::uint64_t e = 0; e < slice_words(); ++e)
            words[at + e] = big_endian(pin.slice_->words[e].load(std::memory_order_acquire));
    return words;
}

void L2Cache::discard_table(std::uint64_t i) {
    for (std::uint64_t n = 0; n < slices_per_table(); ++n) {
        const std::uint64_t key = i * slices_per_table() + n;
        if (key >= keys_)
            break;
        Shard &s = shard(key);
        const Lock guard(s.mutex);
        Slice *slice = directory_[key].load(std::memory_order_acquire);
        if (slice == nullptr)
            continue;
        give_up(*slice);
        if (slice->dirty.exchange(false, std::memory_order_acq_rel))
            dirty_slices_.fetch_sub(1, std::memory_order_relaxed);
        slice->needs = 0;
        std::erase(s.dirty, slice);
        s.free.push_back(slice);
    }
}

} // namespace qlean
