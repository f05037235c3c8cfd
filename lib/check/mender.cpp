// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Counts, flags and entries, where they are.
#include "mender.h"

#include "../refcount_block.h"

namespace qlean {

void write_words(File &file, std::vector<std::uint64_t> words, HostOffset at) {
    for (std::uint64_t &word : words)
        word = big_endian(word);
    file.write(std::as_bytes(std::span(words)), at);
}

void change_header(File &file, const std::function<void(Header &)> &change) {
    auto [header, sector] = read_header(file);
    HeaderHome home(file, std::move(header), std::move(sector));
    home.update(change);
    file.sync();
}

Mender::Mender(File &file, const StopCheck &stop)
    : file_(file), header_(read_header(file).first), geometry_(header_.geometry()), source_(file, header_),
      checker(source_, stop), stop_(stop) {
    checker.run();
}

void Mender::everything() {
    const bool rebuild = checker.needs_rebuild();
    if (rebuild)
        forget_old_structures();
    mend_flags(Flag::clear);
    if (!rebuild)
        mend_counts(Count::raise);
    file_.sync();
    if (rebuild) {
        rebuild_refcounts();
    } else {
        mend_counts(Count::lower);
        file_.sync();
    }
    mend_flags(Flag::set);
    file_.sync();
}

void Mender::leaks() {
    mend_counts(Count::lower);
    file_.sync();
    mend_flags(Flag::set);
    file_.sync();
}

bool Mender::may_write(const Checker::Table &table) const {
    const std::uint64_t c = geometry_.cluster_of(table.at).value;
    return table.at.value % geometry_.cluster_size() == 0 && c < checker.clusters() &&
           checker.exact_references(c) == table.total;
}

bool Mender::may_write_l1() const {
    const std::uint64_t first = geometry_.cluster_of(header_.l1_offset).value;
    for (std::uint64_t i = 0; i < geometry_.clusters_for(std::uint64_t{header_.l1_size} * 8); ++i)
        if (checker.exact_references(first + i) != 1)
            return false;
    return true;
}

// --- counts -------------------------------------------------------------------------------------------------------

/// What a count should be. What an unknown extension may own is kept.
std::uint64_t Mender::wanted(std::uint64_t c, std::uint64_t stored) const {
    std::uint64_t referred = checker.exact_references(c);
    if (const auto old = old_.find(c); old != old_.end()) {
        referred -= std::min(referred, old->second);
        stored -= std::min(stored, old->second);
    }
    referred = std::min(referred, RefcountView::max(header_.refcount_order));
    return header_.has_unknown_extension() ? std::max(stored, referred) : referred;
}

std::uint64_t Mender::final_count(HostCluster c) {
    if (c.value >= checker.clusters())
        return 0;
    const std::uint64_t region = c.value / geometry_.refcounts_per_block();
    if (cached_region_ != region) {
        cached_ = checker.block(region);
        cached_region_ = region;
    }
    const std::uint64_t stored =
        cached_ ? RefcountView(*cached_, header_.refcount_order).get(c.value % geometry_.refcounts_per_block()) : 0;
    return wanted(c.value, stored);
}

void Mender::mend_counts(Count how) {
    const std::uint64_t per_block = geometry_.refcounts_per_block();
    for (std::uint64_t r = 0; r * per_block < checker.clusters(); ++r) {
        if (r >= checker.refcount_table().size() || checker.refcount_table()[r] == 0)
            continue;
        auto bytes = checker.block(r);
        if (!bytes)
            continue;
        RefcountView view(*bytes, header_.refcount_order);
        bool changed = false;
        for (std::uint64_t i = 0; i < per_block && r * per_block + i < checker.clusters(); ++i) {
            const std::uint64_t stored = view.get(i), right = wanted(r * per_block + i, stored);
            if (how == Count::raise ? stored < right : stored > right) {
                view.set(i, right);
                changed = true;
            }
        }
        if (changed)
            file_.write(*bytes, HostOffset{checker.refcount_table()[r]});
    }
    cached_region_ = ~std::uint64_t{0};
}

// --- flags and entries --------------------------------------------------------------------------------------------

/// Beyond the end of the file no count is mended: there it is what is stored, or nothing where that cannot be read.
std::optional<std::uint64_t> Mender::count_by_flag(HostCluster c) {
    return c.value < checker.clusters() ? final_count(c) : checker.refcount(c);
}

/// Of an L1 or L2 entry for a cluster with this count.
bool Mender::mend_flag(std::uint64_t &word, std::optional<std::uint64_t> count, Flag how) {
    if (!count || (*count == 1) == ((word & entry::copied) != 0) || (*count == 1) != (how == Flag::set))
        return false;
    word ^= entry::copied;
    return true;
}

void Mender::mend_flags(Flag how) {
    std::vector<std::uint64_t> words(geometry_.cluster_size() / 8);
    const std::uint64_t step = geometry_.entry_words();
    for (const Checker::Table &table : checker.tables()) {
        require_going(stop_);
        if (table.active == 0 || !may_write(table))
            continue;
        read_words(file_, table.at, words);
        bool changed = false;
        for (std::size_t i = 0; i < words.size(); i += step) {
            std::uint64_t &word = words[i];
            const bool hosted = word & entry::offset_mask || (header_.has_data_file() && word & entry::copied);
            if (!hosted || word & entry::compressed)
                continue;
            const HostCluster c = geometry_.cluster_of(HostOffset{word & entry::offset_mask});
            changed = mend_flag(word, header_.has_data_file() ? 1 : count_by_flag(c), how) || changed;
        }
        if (changed)
            write_words(file_, words, table.at);
    }
    if (!may_write_l1())
        return;
    auto l1 = source_.l1();
    bool changed = false;
    for (std::uint64_t &word : l1)
        if ((word & entry::offset_mask) != 0)
            changed = mend_flag(word, count_by_flag(geometry_.cluster_of(entry::table(word))), how) || changed;
    if (changed)
        write_words(file_, l1, header_.l1_offset);
}

bool Mender::mend_entries() {
    std::vector<std::uint64_t> words(geometry_.cluster_size() / 8);
    const std::uint64_t step = geometry_.entry_words();
    bool any = false;
    for (const Checker::Table &table : checker.tables()) {
        require_going(stop_);
        if (!may_write(table) || header_.version < 3)
            continue;
        read_words(file_, table.at, words);
        bool changed = false;
        for (std::size_t i = 0; i < words.size(); i += step) {
            const std::uint64_t word = words[i], offset = word & entry::offset_mask;
            const std::uint64_t bitmap = step == 2 ? words[i + 1] : 0;
            const std::uint64_t data = bitmap & entry::all_allocated, zeroes = bitmap >> 32;
            if (word & entry::compressed)
                continue;
            const bool aligned = offset % geometry_.cluster_size() == 0;
            const bool empty = step == 2 ? data == 0 : (word & entry::zero) != 0;
            if ((aligned || !empty || offset == 0) && (data & zeroes) == 0 &&
                !(data != 0 && offset == 0 && !header_.has_data_file()))
                continue;
            words[i] = step == 2 ? 0 : entry::zero;
            if (step == 2)
                words[i + 1] = entry::all_zero;
            changed = true;
        }
        if (!changed)
            continue;
        any = true;
        write_words(file_, words, table.at);
    }
    if (any)
        file_.sync();
    return any;
}

} // namespace qlean
