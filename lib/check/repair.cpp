// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Repairing a file that nobody uses. The order keeps every state that a crash can leave at most as damaged as the image
// was: flags that promise "refcount one" wrongly go first, and counts that are too low are raised with them; then
// counts that are too high are lowered; then the flags that may be set are set; then the header says that all is well.
// Nothing is written into a place that something else refers to. What refers to the wrong place stays as it is: nobody
// knows the right one.
#include "../error.h"
#include "../header_home.h"
#include "../refcount_block.h"
#include "check.h"
#include "checker.h"

#include <functional>
#include <map>
#include <set>

namespace qlean {

namespace {

/// What QEMU keeps up, and so do we; others are no longer to be relied on after a change.
constexpr std::uint64_t known_autoclear = Header::autoclear_bitmaps | Header::autoclear_data_file_raw;

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

class Mender {
  public:
    Mender(File &file, const StopCheck &stop)
        : file_(file), header_(read_header(file).first), geometry_(header_.geometry()), source_(file, header_),
          checker(source_, stop), stop_(stop) {
        checker.run();
    }

    void everything() {
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

    void leaks() {
        mend_counts(Count::lower);
        file_.sync();
        mend_flags(Flag::set);
        file_.sync();
    }

    /// Entries whose meaning is lost although they hold nothing become zeroes, as QEMU does it. True: there were some.
    bool mend_entries();
    /// Tables in places that something else refers to as well get places of their own, so that their flags can be
    /// mended; whoever else uses the old place keeps what is there. True: there were some.
    bool separate();

  private:
    enum class Flag { clear, set };
    enum class Count { raise, lower };

    std::uint64_t stored(std::uint64_t c, const RefcountView &view, std::uint64_t i) const;
    std::uint64_t wanted(std::uint64_t c, std::uint64_t stored) const;
    std::uint64_t final_count(HostCluster c);
    void mend_counts(Count how);
    void mend_flags(Flag how);
    bool mend_flag(std::uint64_t &word, Flag how);
    void forget_old_structures();
    void rebuild_refcounts();
    bool may_write(const Checker::Table &table) const;
    bool may_write_l1() const;

    File &file_;
    const Header header_;
    const Geometry geometry_;
    FileSource source_;

  public:
    Checker checker;

  private:
    const StopCheck &stop_;
    /// How often the refcount structures that are to go refer to a cluster.
    std::map<std::uint64_t, std::uint64_t> old_;
    std::uint64_t cached_region_ = ~std::uint64_t{0};
    std::optional<std::vector<std::byte>> cached_;
};

bool Mender::may_write(const Checker::Table &table) const {
    const std::uint64_t c = geometry_.cluster_of(table.at).value;
    return table.at.value % geometry_.cluster_size() == 0 && c < checker.clusters() &&
           checker.references(c) == table.total;
}

bool Mender::may_write_l1() const {
    const std::uint64_t first = geometry_.cluster_of(header_.l1_offset).value;
    for (std::uint64_t i = 0; i < geometry_.clusters_for(std::uint64_t{header_.l1_size} * 8); ++i)
        if (checker.references(first + i) != 1)
            return false;
    return true;
}

// --- counts -------------------------------------------------------------------------------------------------------

/// What a count should be. What an unknown extension may own is kept.
std::uint64_t Mender::wanted(std::uint64_t c, std::uint64_t stored) const {
    std::uint64_t referred = checker.references(c);
    if (const auto old = old_.find(c); old != old_.end()) {
        referred -= std::min(referred, old->second);
        stored -= std::min(stored, old->second);
    }
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

bool Mender::mend_flag(std::uint64_t &word, Flag how) {
    const bool one =
        header_.has_data_file() || final_count(geometry_.cluster_of(HostOffset{word & entry::offset_mask})) == 1;
    if (one == ((word & entry::copied) != 0) || one != (how == Flag::set))
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
            if (hosted && !(word & entry::compressed))
                changed = mend_flag(word, how) || changed;
        }
        if (changed)
            write_words(file_, words, table.at);
    }
    if (!may_write_l1())
        return;
    auto l1 = source_.l1();
    bool changed = false;
    for (std::uint64_t &word : l1) {
        if ((word & entry::offset_mask) == 0)
            continue;
        const bool one = final_count(geometry_.cluster_of(entry::table(word))) == 1;
        if (one != ((word & entry::copied) != 0) && one == (how == Flag::set)) {
            word ^= entry::copied;
            changed = true;
        }
    }
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

bool Mender::separate() {
    const bool move_l1 = header_.l1_size > 0 && !may_write_l1();
    std::vector<Checker::Table> moves;
    for (const Checker::Table &table : checker.tables())
        if (table.active > 0 && !may_write(table) && table.at.value % geometry_.cluster_size() == 0 &&
            geometry_.cluster_of(table.at).value < checker.clusters())
            moves.push_back(table);
    if (moves.empty() && !move_l1)
        return false;
    HostCluster free{std::max(checker.clusters(), geometry_.clusters_for(file_.length()))};
    const std::uint64_t l1_clusters = geometry_.clusters_for(std::uint64_t{header_.l1_size} * 8);
    file_.truncate(geometry_.offset_of(free + moves.size() + (move_l1 ? l1_clusters : 0)).value);
    std::map<HostOffset, HostOffset> moved;
    std::vector<std::byte> bytes(geometry_.cluster_size());
    for (const Checker::Table &table : moves) {
        file_.read(bytes, table.at);
        file_.write(bytes, geometry_.offset_of(free));
        moved[table.at] = geometry_.offset_of(free);
        ++free;
    }
    auto l1 = source_.l1();
    for (std::uint64_t &word : l1)
        if (const auto found = moved.find(entry::table(word)); found != moved.end())
            word = (word & ~entry::offset_mask) | found->second.value;
    file_.sync();
    if (move_l1) {
        write_words(file_, l1, geometry_.offset_of(free));
        file_.sync();
        change_header(file_, [&](Header &h) { h.l1_offset = geometry_.offset_of(free); });
    } else {
        write_words(file_, l1, header_.l1_offset);
        file_.sync();
    }
    return true;
}

// --- new refcount structures --------------------------------------------------------------------------------------

/// They refer to clusters that nothing refers to once the header points elsewhere.
void Mender::forget_old_structures() {
    const auto &table = checker.refcount_table();
    const std::uint64_t first = geometry_.cluster_of(header_.refcount_table_offset).value;
    for (std::uint64_t i = 0; i < header_.refcount_table_clusters; ++i)
        ++old_[first + i];
    for (const std::uint64_t word : table)
        if (word != 0 && word % geometry_.cluster_size() == 0 &&
            geometry_.cluster_of(HostOffset{word}).value < checker.clusters())
            ++old_[geometry_.cluster_of(HostOffset{word}).value];
}

/// At the end of the file, where nothing is that anybody may miss. They count when the header points there.
void Mender::rebuild_refcounts() {
    const std::uint64_t per_block = geometry_.refcounts_per_block();
    const std::uint64_t start = std::max(checker.clusters(), geometry_.clusters_for(file_.length()));
    std::set<std::uint64_t> used;
    for (std::uint64_t c = 0; c < start; ++c) {
        if (final_count({c}) == 0)
            continue;
        used.insert(c / per_block);
        c = (c / per_block + 1) * per_block - 1;
    }
    std::uint64_t table_clusters = 0, area = 0;
    for (;;) {
        for (std::uint64_t r = start / per_block; area > 0 && r <= (start + area - 1) / per_block; ++r)
            used.insert(r);
        table_clusters = used.empty() ? 1 : geometry_.clusters_for((*used.rbegin() + 1) * 8);
        if (area >= used.size() + table_clusters)
            break;
        area = used.size() + table_clusters;
    }
    if (geometry_.bytes(table_clusters) >
        std::max<std::uint64_t>(Header::max_refcount_table_bytes, geometry_.cluster_size()))
        throw Error(Error::Kind::no_space, ENOSPC,
                    fmt::format("'{}' cannot be repaired in place: its refcount table would exceed 8 MiB; convert it "
                                "to a new image with larger clusters",
                                file_.name()));
    file_.truncate(geometry_.bytes(start + area));
    std::vector<std::uint64_t> table(geometry_.bytes(table_clusters) / 8);
    std::vector<std::byte> bytes(geometry_.cluster_size());
    std::uint64_t home = start;
    for (const std::uint64_t r : used) {
        std::fill(bytes.begin(), bytes.end(), std::byte{0});
        RefcountView view(bytes, header_.refcount_order);
        for (std::uint64_t i = 0; i < per_block; ++i) {
            const std::uint64_t c = r * per_block + i;
            if (c < start)
                view.set(i, final_count({c}));
            else if (c < start + area)
                view.set(i, 1);
        }
        file_.write(bytes, geometry_.offset_of(HostCluster{home}));
        table[r] = geometry_.offset_of(HostCluster{home}).value;
        ++home;
    }
    const HostOffset table_home = geometry_.offset_of(HostCluster{start + area - table_clusters});
    write_words(file_, table, table_home);
    file_.sync();
    change_header(file_, [&](Header &h) {
        h.refcount_table_offset = table_home;
        h.refcount_table_clusters = static_cast<std::uint32_t>(table_clusters);
    });
}

} // namespace

CheckReport check_file(File &file, const StopCheck &stop) {
    Header header = read_header(file).first;
    header.require_known(file.name());
    FileSource source(file, std::move(header));
    Checker checker(source, stop);
    checker.run();
    return std::move(checker.report);
}

CheckReport repair_file(File &file, Repair how, const StopCheck &stop) {
    const Header header = read_header(file).first;
    header.require_known(file.name());
    if (how == Repair::none)
        return check_file(file, stop);
    CheckReport before;
    const auto first_change = [&] {
        if (header.autoclear & ~known_autoclear)
            change_header(file, [](Header &h) { h.autoclear &= known_autoclear; });
    };
    {
        std::optional<Mender> mender(std::in_place, file, stop);
        before = mender->checker.report;
        if (!mender->checker.complete())
            return before;
        if (how == Repair::leaks && before.corruptions == 0 && before.leaks != 0 && !header.has_unknown_extension()) {
            first_change();
            mender->leaks();
        } else if (how == Repair::all && !before.clean()) {
            // Half a repair is a reason to repair first: that is what the dirty bit says to everybody.
            change_header(file, [](Header &h) {
                h.autoclear &= known_autoclear;
                if (h.version >= 3)
                    h.incompatible |= Header::incompatible_dirty;
            });
            // Each may make room for the other: an entry that is no more shares nothing, a table of its own may be
            // written.
            constexpr int most = 4;
            for (int i = 0; i < most && (mender->mend_entries() || mender->separate()); ++i)
                mender.emplace(file, stop);
            mender->everything();
        }
    }
    CheckReport after = before.clean() ? before : check_file(file, stop);
    after.leaks_fixed = before.leaks - std::min(before.leaks, after.leaks);
    after.corruptions_fixed = before.corruptions - std::min(before.corruptions, after.corruptions);
    constexpr std::uint64_t marks = Header::incompatible_dirty | Header::incompatible_corrupt;
    const std::uint64_t left = after.corruptions == 0 && after.check_errors == 0 ? 0 : header.incompatible & marks;
    if ((read_header(file).first.incompatible & marks) != left)
        change_header(file, [&](Header &h) { h.incompatible = (h.incompatible & ~marks) | left; });
    return after;
}

} // namespace qlean
