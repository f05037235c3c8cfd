// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "checker.h"

#include "../refcount_block.h"

#include <algorithm>
#include <limits>

namespace qlean {

namespace {

/// As many as QEMU checks.
constexpr std::uint64_t max_clusters = std::numeric_limits<std::int32_t>::max();
constexpr std::uint64_t max_offset = std::numeric_limits<std::int64_t>::max();
constexpr std::uint64_t near_clusters = 64; ///< beyond the end of a file that has fewer
constexpr std::uint64_t l1_reserved = 0x7f00'0000'0000'01ff;
constexpr std::uint64_t l2_reserved = 0x3f00'0000'0000'01fe;
constexpr std::uint64_t table_reserved = 0x1ff;

} // namespace

Checker::Checker(CheckSource &source, const StopCheck &stop)
    : source_(source), stop_(stop), header_(source.header()), geometry_(header_.geometry()),
      cluster_(geometry_.cluster_size()), clusters_(geometry_.clusters_for(source.length())) {}

void Checker::corrupt(std::string text, std::uint64_t times) {
    report.corruptions += times;
    report.add_problem(std::move(text));
}

void Checker::give_up(std::string text) {
    complete_ = false;
    ++report.check_errors;
    report.add_problem(std::move(text));
}

void Checker::run() {
    report.total_clusters = geometry_.guest_clusters();
    if (clusters_ > max_clusters)
        return give_up(
            fmt::format("the file has {} clusters; no more than {} can be checked", clusters_, max_clusters));
    // What a guest takes beyond is touched. One more, since the last cluster may be partial.
    const std::uint64_t capacity = clusters_ + 1;
    tally_ = std::make_unique<ReferenceTally>(capacity, RefcountView::max(header_.refcount_order));
    ones_ = std::make_unique<LazyBytes>(capacity / 8 + 1);
    table_ = source_.refcount_table();
    load_refcounts();

    count({0}, cluster_, "the header");
    l1_ = source_.l1();
    count(header_.l1_offset, std::uint64_t{header_.l1_size} * 8, "the L1 table");
    add_tables(l1_, 1, true);
    count_snapshots();
    join_tables();
    words_.resize(cluster_ / 8);
    for (const Table &table : tables_)
        count_table(table);
    count(header_.refcount_table_offset, geometry_.bytes(header_.refcount_table_clusters), "the refcount table");
    if (const auto *e = header_.extension(Header::extension_encryption); e != nullptr && e->data.size() >= 16)
        count({load_be<std::uint64_t>(e->data, 0)}, load_be<std::uint64_t>(e->data, 8), "the encryption header");
    count_bitmaps();
    count_refcount_blocks();
    source_.all_read();
    compare();
    check_l1_flags();
}

// --- refcounts ----------------------------------------------------------------------------------------------------

std::optional<std::vector<std::byte>> Checker::block(std::uint64_t region) {
    std::vector<std::byte> bytes(cluster_);
    const std::uint64_t at = region < table_.size() ? table_[region] & ~table_reserved : 0;
    if (at % cluster_ != 0 || at > max_offset - cluster_)
        return std::nullopt;
    if (at != 0 && at < source_.length())
        source_.refcount_block({at}, bytes);
    return bytes;
}

void Checker::load_refcounts() {
    const std::uint64_t per_block = geometry_.refcounts_per_block();
    for (std::uint64_t r = 0; r < table_.size() && r * per_block < tally_->capacity(); ++r) {
        if (table_[r] == 0)
            continue;
        require_going(stop_);
        auto bytes = block(r);
        if (!bytes)
            continue;
        const RefcountView view(*bytes, header_.refcount_order);
        for (std::uint64_t i = 0; i < per_block && r * per_block + i < tally_->capacity(); ++i)
            if (view.get(i) == 1) {
                const std::uint64_t c = r * per_block + i;
                (*ones_)[c / 8] = static_cast<std::uint8_t>((*ones_)[c / 8] | 1u << c % 8);
            }
    }
}

std::optional<std::uint64_t> Checker::refcount(HostCluster c) {
    const std::uint64_t region = c.value / geometry_.refcounts_per_block();
    if (region < table_.size() && (table_[region] & ~table_reserved) % cluster_ != 0)
        return std::nullopt;
    if (c.value < tally_->capacity())
        return (*ones_)[c.value / 8] >> c.value % 8 & 1;
    if (region >= table_.size() || table_[region] == 0)
        return 0;
    auto bytes = block(region); // beyond the end of the file: rare
    if (!bytes)
        return std::nullopt;
    return RefcountView(*bytes, header_.refcount_order).get(c.value % geometry_.refcounts_per_block());
}

void Checker::count_refcount_blocks() {
    for (std::uint64_t r = 0; r < table_.size(); ++r) {
        const std::uint64_t word = table_[r], at = word & ~table_reserved;
        if (word == 0)
            continue;
        if (word & table_reserved || at % cluster_ != 0) {
            corrupt(fmt::format("refcount table entry {} is {:#x}, which is no valid block", r, word));
            rebuild_ = true;
            continue;
        }
        const HostCluster c = geometry_.cluster_of(HostOffset{at});
        if (source_.touched(c))
            continue;
        if (c.value >= clusters_) {
            corrupt(fmt::format("refcount block {} at {:#x} lies beyond the end of the file", r, at));
            rebuild_ = true;
            continue;
        }
        count({at}, cluster_, "a refcount block");
        if (references(c.value) != 1) {
            corrupt(fmt::format("refcount block {} at {:#x} is used {} times", r, at, references(c.value)));
            rebuild_ = true;
        }
        rebuild_ = rebuild_ || exact_references(c.value) != 1; // what a narrow refcount cannot say
    }
    for (std::uint64_t c = geometry_.cluster_of(header_.refcount_table_offset).value, n = 0;
         n < header_.refcount_table_clusters; ++n)
        rebuild_ = rebuild_ || exact_references(c + n) > 1;
}

void Checker::compare() {
    const std::uint64_t per_block = geometry_.refcounts_per_block();
    std::uint64_t end = 1;
    for (std::uint64_t r = 0; r * per_block < clusters_; ++r) {
        require_going(stop_);
        auto bytes = block(r);
        if (!bytes) {
            const std::uint64_t n = std::min(per_block, clusters_ - r * per_block);
            report.check_errors += n;
            report.add_problem(fmt::format("the refcounts of {} clusters from {} on cannot be read", n, r * per_block));
            continue;
        }
        const bool has_block = r < table_.size() && (table_[r] & ~table_reserved) != 0;
        const RefcountView view(*bytes, header_.refcount_order);
        for (std::uint64_t i = 0; i < per_block && r * per_block + i < clusters_; ++i) {
            const std::uint64_t c = r * per_block + i, counted = view.get(i), referred = references(c);
            if (counted != 0 || referred != 0)
                end = c + 1;
            if (counted == referred || source_.touched({c}))
                continue;
            if (counted < referred) {
                rebuild_ = rebuild_ || !has_block;
                corrupt(fmt::format("host cluster {} is referred to {} times, but has a refcount of {}", c, referred,
                                    counted));
                continue;
            }
            ++report.leaks;
            report.add_problem(fmt::format("host cluster {} is leaked: it has a refcount of {} and {} references", c,
                                           counted, referred));
            if (referred == 0)
                unreferenced_.push_back({{c}, counted});
        }
    }
    report.image_end_offset = geometry_.bytes(end);
}

// --- references ---------------------------------------------------------------------------------------------------

void Checker::count(HostOffset at, std::uint64_t bytes, const char *what, std::uint64_t times) {
    if (bytes == 0)
        return;
    // The last cluster of a file may be partial; but nothing may reach a whole cluster beyond its end.
    if (bytes > max_offset || at.value > max_offset - bytes || at.value + bytes >= source_.length() + cluster_) {
        const std::uint64_t near = std::max(source_.length(), near_clusters * cluster_);
        if (bytes <= near && at.value <= source_.length() + near)
            reach_ = std::max(reach_, geometry_.clusters_for(at.value + bytes));
        if (!source_.touched(geometry_.cluster_of(at)))
            corrupt(fmt::format("{} at {:#x} lies beyond the end of the file", what, at.value), times);
        return;
    }
    const std::uint64_t last = geometry_.cluster_of(at + (bytes - 1)).value;
    for (std::uint64_t c = geometry_.cluster_of(at).value; c <= last && c < tally_->capacity(); ++c) {
        clusters_ = std::max(clusters_, c + 1);
        if (const std::uint64_t lost = tally_->add(c, times); lost > 0 && !source_.touched({c}))
            corrupt(fmt::format("host cluster {} has more references than a refcount of {} bits can say", c,
                                1u << header_.refcount_order),
                    lost);
    }
}

void Checker::add_tables(const std::vector<std::uint64_t> &l1, std::uint64_t times, bool active) {
    for (std::size_t i = 0; i < l1.size(); ++i) {
        if (l1[i] == 0)
            continue;
        if (l1[i] & l1_reserved)
            corrupt(fmt::format("entry {} of an L1 table is {:#x}, with reserved bits set", i, l1[i]), times);
        tables_.push_back({entry::table(l1[i]), active ? times : 0, times, i});
    }
    if (tables_.size() > 2 * joined_ + 4096)
        join_tables();
}

/// One of each, however often it is pointed to; in the order of the file.
void Checker::join_tables() {
    std::stable_sort(tables_.begin(), tables_.end(),
                     [](const Table &a, const Table &b) { return a.at != b.at ? a.at < b.at : a.active > b.active; });
    std::size_t kept = 0;
    for (const Table &table : tables_) {
        if (kept == 0 || tables_[kept - 1].at != table.at) {
            tables_[kept++] = table;
            continue;
        }
        tables_[kept - 1].active += table.active;
        tables_[kept - 1].total += table.total;
    }
    tables_.resize(kept);
    joined_ = kept;
}

void Checker::count_table(const Table &table) {
    require_going(stop_);
    count(table.at, cluster_, "an L2 table", table.total);
    if (table.at.value % cluster_ != 0)
        corrupt(fmt::format("the L2 table at {:#x} is not at a cluster boundary", table.at.value), table.total);
    if (table.at.value >= source_.length() && !source_.live())
        return; // nothing but zeroes
    if (table.active > 0)
        source_.l2(table.index, table.at, words_);
    else
        read_words(source_.file(), table.at, words_);
    const std::uint64_t step = geometry_.entry_words();
    std::uint64_t expected = 0;
    for (std::uint64_t n = 0; n * step < words_.size(); ++n) {
        L2Words words{words_[n * step], step == 2 ? words_[n * step + 1] : 0};
        if (words == L2Words{})
            continue;
        if (source_.live() && table.active > 0 && seems_wrong(words))
            words = source_.l2_again(table.index, n);
        count_entry(table, n, words, expected);
    }
}

Checker::Type Checker::type_of(std::uint64_t word) const {
    if (word & entry::compressed)
        return Type::compressed;
    const bool offset = word & entry::offset_mask;
    if (word & entry::zero && !header_.has_subclusters())
        return offset ? Type::zero_allocated : Type::zero;
    return offset || (header_.has_data_file() && word & entry::copied) ? Type::normal : Type::unallocated;
}

/// The flag says "refcount one", and that is not so; or the other way round.
bool Checker::flag_is_wrong(std::uint64_t word, HostCluster c) {
    const auto count = header_.has_data_file() ? 1 : refcount(c);
    return count && (*count == 1) != ((word & entry::copied) != 0);
}

bool Checker::seems_wrong(const L2Words &words) {
    const Type type = type_of(words.entry);
    const HostOffset at{words.entry & entry::offset_mask};
    if (type == Type::compressed)
        return words.entry & entry::copied || words.bitmap != 0 || header_.has_data_file();
    if (words.entry & l2_reserved || words.bitmap >> 32 & words.bitmap & entry::all_allocated)
        return true;
    if (type == Type::unallocated)
        return words.bitmap & entry::all_allocated;
    return type != Type::zero && (at.value % cluster_ != 0 || flag_is_wrong(words.entry, geometry_.cluster_of(at)) ||
                                  (!header_.has_data_file() && at.value + cluster_ >= source_.length() + cluster_));
}

void Checker::count_entry(const Table &table, std::uint64_t n, L2Words words, std::uint64_t &expected) {
    const Type type = type_of(words.entry);
    const HostOffset at{words.entry & entry::offset_mask};
    const auto wrong = [&](const char *what, std::uint64_t times) {
        corrupt(fmt::format("entry {} of the L2 table at {:#x} is {:#x}: {}", n, table.at.value, words.entry, what),
                times);
    };
    if (type != Type::compressed && words.entry & l2_reserved)
        wrong("reserved bits are set", table.total);

    if (type == Type::compressed) {
        if (words.entry & entry::copied)
            wrong("a compressed cluster cannot have a refcount of one by this flag", table.total);
        if (header_.has_data_file())
            return wrong("a compressed cluster in an image with an external data file", table.total);
        if (words.bitmap != 0)
            return wrong("a compressed cluster cannot have subclusters", table.total);
        const auto extent =
            entry::compressed_extent(words.entry & ~(entry::copied | entry::compressed), geometry_.cluster_bits());
        count(extent.at, extent.bytes, "a compressed cluster", table.total);
        report.allocated_clusters += table.active;
        report.compressed_clusters += table.active;
        report.fragmented_clusters += table.active;
        return;
    }
    if (type == Type::unallocated) {
        if (words.bitmap & entry::all_allocated)
            wrong("subclusters are allocated without a cluster", table.total);
        return;
    }
    if (type == Type::zero)
        return;

    // The flag is compared with what is stored, whatever else is wrong; of the active image alone.
    const HostCluster host = geometry_.cluster_of(at);
    if (table.active > 0 && flag_is_wrong(words.entry, host) && !source_.touched(host))
        wrong(words.entry & entry::copied ? "the flag says that it has a refcount of one, which it has not"
                                          : "it has a refcount of one, but not the flag that says so",
              table.active);
    if (words.bitmap >> 32 & words.bitmap & entry::all_allocated)
        wrong("subclusters are allocated and zero at once", table.total);
    if (at.value % cluster_ != 0)
        wrong("the cluster is not at a cluster boundary", table.total);
    report.allocated_clusters += table.active;
    if (expected != 0 && at.value != expected)
        report.fragmented_clusters += table.active;
    expected = at.value + cluster_;
    if (!header_.has_data_file())
        count(at, cluster_, "a cluster of data", table.total);
}

void Checker::check_l1_flags() {
    for (std::size_t i = 0; i < l1_.size(); ++i) {
        const HostOffset at = entry::table(l1_[i]);
        if (at.value == 0)
            continue;
        const HostCluster c = geometry_.cluster_of(at);
        const auto count = refcount(c);
        if (count && (*count == 1) != ((l1_[i] & entry::copied) != 0) && !source_.touched(c))
            corrupt(fmt::format("L1 entry {} is {:#x}: its flag does not fit the refcount of the table", i, l1_[i]));
    }
}

} // namespace qlean
