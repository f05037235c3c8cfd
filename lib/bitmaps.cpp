// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "bitmaps.h"

#include "byte_order.h"
#include "error.h"
#include "sparse_bits.h"

namespace qlean {

namespace {

std::uint64_t table_clusters(const Geometry &geometry, const BitmapEntry &entry) {
    return geometry.clusters_for(entry.table_bytes());
}

/// In host byte order; empty if the table lies beyond the end of the file.
std::vector<std::uint64_t> read_words(const Geometry &geometry, File &file, const BitmapEntry &entry,
                                      std::uint64_t end) {
    if (geometry.cluster_of(entry.table).value + table_clusters(geometry, entry) > end)
        return {};
    std::vector<std::uint64_t> words(entry.table_size);
    const auto data = file.next_data(entry.table);
    if (data && *data < entry.table + entry.table_bytes())
        file.read(std::as_writable_bytes(std::span(words)), entry.table);
    for (std::uint64_t &word : words)
        word = big_endian(word);
    return words;
}

bool impossible(const BitmapWord &word, std::uint64_t end) {
    return word.kind == BitmapWord::Kind::damaged || (word.kind == BitmapWord::Kind::stored && word.host.value >= end);
}

/// What QEMU would read when it opens the image has to make sense; a bitmap that is inconsistent may not.
void require_tables(const BitmapDirectory &directory, const Geometry &geometry, File &file, std::uint64_t end) {
    std::uint64_t clusters = 0;
    for (const BitmapEntry &e : directory.entries) {
        // Every table has its own clusters: the file bounds what there is to read.
        clusters += table_clusters(geometry, e);
        if (clusters > end)
            throw_bad_image("'{}' is damaged: its bitmap tables are larger than the file", file.name());
        if (e.in_use())
            continue;
        const auto table = read_words(geometry, file, e, end);
        if (table.empty())
            throw_bad_image("'{}' is truncated: the table of a bitmap at {:#x} lies beyond the end of the file",
                            file.name(), e.table.value);
        for (const std::uint64_t word : table)
            if (impossible(BitmapWord::decode(word, geometry), end))
                throw_bad_image("'{}' is damaged: the bitmap table at {:#x} has the impossible entry {:#x}; see "
                                "'qemu-img check'",
                                file.name(), e.table.value, word);
    }
}

} // namespace

// --- opening ------------------------------------------------------------------------------------------------------

std::optional<BitmapDirectory> Bitmaps::read(File &file, const Header &header, std::uint64_t end) {
    const Geometry geometry = header.geometry();
    const HeaderExtension *extension = header.extension(Header::extension_bitmaps);
    if (!header.bitmaps_count() || !extension)
        return std::nullopt;
    for (const HeaderExtension &other : header.extensions)
        if (other.type == extension->type && &other != extension)
            throw_bad_image("'{}' is damaged: it has more than one bitmaps header extension", file.name());
    const auto place = BitmapsExtension::parse(extension->data, geometry, file.name());
    if (geometry.cluster_of(place.directory).value + geometry.clusters_for(place.directory_bytes) > end)
        throw_bad_image("'{}' is truncated: its bitmap directory at {:#x} lies beyond the end of the file", file.name(),
                        place.directory.value);
    std::vector<std::byte> bytes(place.directory_bytes);
    file.read(bytes, place.directory);
    BitmapDirectory directory{place.directory, place.directory_bytes,
                              parse_bitmap_directory(bytes, place.count, geometry, file.name())};
    require_tables(directory, geometry, file, end);
    return directory;
}

Bitmaps::Bitmaps(BitmapDirectory directory, const Geometry &geometry, File &file, HeaderHome &header,
                 Refcounts &refcounts, Allocator &allocator, WriteBack &write_back, Claims &claims, EachRun metadata)
    : geometry_(geometry), file_(file), header_(header), refcounts_(refcounts), allocator_(allocator),
      write_back_(write_back), claims_(claims), metadata_(std::move(metadata)), directory_(directory.at),
      directory_bytes_(directory.bytes), entries_(std::move(directory.entries)) {}

// --- where things are ---------------------------------------------------------------------------------------------

BitmapEntry Bitmaps::entry(std::size_t i) const {
    const Lock guard(mutex_);
    return entries_[i];
}

HostOffset Bitmaps::entry_home(std::size_t i) const {
    const Lock guard(mutex_);
    return directory_ + entries_[i].at;
}

HostRun Bitmaps::directory_run() const {
    const Lock guard(mutex_);
    return {geometry_.cluster_of(directory_), geometry_.clusters_for(directory_bytes_)};
}

std::vector<std::uint64_t> Bitmaps::read_table(const BitmapEntry &entry) const {
    return read_words(geometry_, file_, entry, allocator_.end());
}

void Bitmaps::each_run(const VisitRun &visit) const {
    if (!count())
        return;
    visit(directory_run());
    for (std::size_t i = 0; i < size(); ++i) {
        const BitmapEntry e = entry(i);
        const auto table = read_table(e);
        if (table.empty())
            continue;
        visit(table_run(e));
        for (const std::uint64_t word : table)
            if (const BitmapWord w = BitmapWord::decode(word, geometry_);
                w.kind == BitmapWord::Kind::stored && w.host.value < allocator_.end())
                visit({w.host, 1});
    }
}

std::optional<std::string> Bitmaps::damage() const {
    for (std::size_t i = 0; i < size() && count(); ++i) {
        const BitmapEntry e = entry(i);
        const auto table = read_table(e);
        bool damaged = table.empty();
        for (const std::uint64_t word : table)
            damaged = damaged || impossible(BitmapWord::decode(word, geometry_), allocator_.end());
        if (damaged)
            return fmt::format("the table of a bitmap at {:#x} is not valid", e.table.value);
    }
    return std::nullopt;
}

void Bitmaps::switch_directory(HostOffset home) {
    header_.set_extension_word(Header::extension_bitmaps, BitmapsExtension::offset_at, home.value);
    const Lock guard(mutex_);
    directory_ = home;
}

void Bitmaps::switch_table(std::size_t i, HostOffset home) {
    const std::uint64_t word = big_endian(home.value);
    file_.write(std::as_bytes(std::span(&word, 1)), entry_home(i) + BitmapEntry::table_at);
    const Lock guard(mutex_);
    entries_[i].table = home;
}

void Bitmaps::switch_stored(std::size_t i, const std::vector<std::pair<std::uint64_t, HostCluster>> &words) {
    const BitmapEntry e = entry(i);
    for (std::size_t done = 0; done < words.size();) {
        std::vector<std::uint64_t> run;
        const std::uint64_t first = words[done].first;
        for (; done < words.size() && words[done].first == first + run.size(); ++done)
            run.push_back(big_endian(geometry_.offset_of(words[done].second).value));
        file_.write(std::as_bytes(std::span(run)), e.table + first * 8);
    }
}

// --- before the first change --------------------------------------------------------------------------------------

void Bitmaps::begin() {
    const Lock guard(begin_mutex_);
    if (begun_ || paused_)
        return;
    write_back_.lead([this] { begin_as_leader(); });
    begun_.store(true, std::memory_order_release);
}

void Bitmaps::begin_as_leader() {
    if (!tracked_.empty()) // storing them failed half-way
        return set_in_use(tracked_entries(), true);
    if (!claimed_) { // once: a place that they get later may be one that data had before
        each_run([this](HostRun run) { claims_.taken(run); });
        claimed_ = true;
    }
    std::vector<std::size_t> chosen;
    for (std::size_t i = 0; i < size(); ++i)
        if (entry(i).tracked())
            chosen.push_back(i);
    if (chosen.empty())
        return;
    if (const auto why = unsafe())
        return give_up(*why);
    std::vector<Tracked> tracked;
    for (const std::size_t i : chosen) {
        const BitmapEntry e = entry(i);
        tracked.push_back({i, e.granularity_bits, DirtyBits(e.bits(geometry_.virtual_size()))});
    }
    set_in_use(chosen, true);
    tracked_ = std::move(tracked);
}

void Bitmaps::set_in_use(const std::vector<std::size_t> &which, bool in_use) {
    if (which.empty())
        return;
    const auto changed = [in_use](std::uint32_t flags) {
        return in_use ? flags | BitmapEntry::flag_in_use : flags & ~BitmapEntry::flag_in_use;
    };
    // Each flag is in one sector. Should power fail in between, some bitmaps are inconsistent and others are right.
    for (const std::size_t i : which) {
        const std::uint32_t word = big_endian(changed(entry(i).flags));
        file_.write(std::as_bytes(std::span(&word, 1)), entry_home(i) + BitmapEntry::flags_at);
    }
    write_back_.sync_as_leader();
    const Lock guard(mutex_);
    for (const std::size_t i : which)
        entries_[i].flags = changed(entries_[i].flags);
}

std::vector<std::size_t> Bitmaps::tracked_entries() const {
    std::vector<std::size_t> entries;
    for (const Tracked &t : tracked_)
        entries.push_back(t.entry);
    return entries;
}

/// Why nothing of the bitmaps may be written in place: a cluster of theirs may hold something else too.
std::optional<std::string> Bitmaps::unsafe() const {
    std::optional<std::string> why;
    SparseBits own(allocator_.end());
    each_run([&](HostRun run) {
        for (HostCluster c = run.first; c < run.end(); ++c) {
            if (why)
                return;
            if (own.set(c.value))
                why = fmt::format("host cluster {} is used twice", c.value);
            else if (const std::uint64_t n = refcounts_.get(c); n != 1)
                why = fmt::format("host cluster {} has a refcount of {}", c.value, n);
        }
    });
    metadata_([&](HostRun run) {
        for (HostCluster c = run.first; c < run.end() && !why; ++c)
            if (own.has(c.value))
                why = fmt::format("host cluster {} is used twice", c.value);
    });
    return why;
}

/// What a program does that knows nothing of bitmaps: from now on they do not count.
void Bitmaps::give_up(const std::string &why) {
    header_.update([](Header &h) { h.autoclear &= ~Header::autoclear_bitmaps; });
    write_back_.sync_as_leader();
    given_up_ = true;
    if (report_)
        report_(Error(Error::Kind::bad_image, EIO,
                      fmt::format("'{}' is damaged: a bitmap shares its place with something else ({}), so all bitmaps "
                                  "of the image are discarded; run 'qemu-img check' on it",
                                  file_.name(), why)));
}

// --- a clean end --------------------------------------------------------------------------------------------------

bool Bitmaps::store() {
    if (tracked_.empty())
        return false;
    write_back_.lead([this] { store_as_leader(); });
    return true;
}

Allocator::Reservation Bitmaps::reserve(std::uint64_t count) {
    for (int commits = 0; commits < WriteBack::max_commits_for_space; ++commits) {
        auto reserved = allocator_.reserve(count, Allocator::Growth::now);
        if (!reserved.empty())
            return reserved;
        write_back_.commit_as_leader(WriteBack::Give::back);
    }
    throw Error(Error::Kind::no_space, ENOSPC,
                fmt::format("'{}' cannot grow any further, so its bitmaps cannot be stored", file_.name()));
}

void Bitmaps::store_as_leader() {
    std::vector<Allocator::Reservation> reserved;
    std::vector<std::vector<std::pair<std::uint64_t, HostCluster>>> words(tracked_.size());
    for (std::size_t n = 0; n < tracked_.size(); ++n)
        store_bits(tracked_[n], reserved, words[n]);
    write_back_.write_refcounts_as_leader();
    write_back_.sync_as_leader();
    // The bits and the refcounts of their clusters are durable: now the tables may point there.
    if (!reserved.empty()) {
        for (auto &r : reserved)
            r.publish();
        write_back_.switch_as_leader([&] {
            for (std::size_t n = 0; n < tracked_.size(); ++n)
                switch_stored(tracked_[n].entry, words[n]);
        });
    }
    // If this fails nobody knows what the file says: whoever changes something first says once more that they are in
    // use.
    begun_.store(false, std::memory_order_release);
    set_in_use(tracked_entries(), false);
    tracked_.clear();
}

/// Writes the clusters of one bitmap in which bits were set; `words` is what its table has to say of new ones.
void Bitmaps::store_bits(const Tracked &tracked, std::vector<Allocator::Reservation> &reserved,
                         std::vector<std::pair<std::uint64_t, HostCluster>> &words) {
    const std::uint64_t cluster = geometry_.cluster_size();
    const auto table = read_table(entry(tracked.entry));
    std::vector<std::byte> bytes(cluster);
    std::vector<std::uint64_t> missing;
    tracked.bits.each_touched(cluster, [&](std::uint64_t i) {
        const BitmapWord w = BitmapWord::decode(table.at(i), geometry_);
        if (w.kind == BitmapWord::Kind::zeroes)
            missing.push_back(i);
        if (w.kind != BitmapWord::Kind::stored)
            return;
        file_.read(bytes, geometry_.offset_of(w.host));
        const auto before = bytes;
        tracked.bits.merge_into(bytes, i * cluster);
        if (bytes != before)
            file_.write(bytes, geometry_.offset_of(w.host));
    });
    if (missing.empty())
        return;
    reserved.push_back(reserve(missing.size()));
    auto next = missing.begin();
    for (const auto &extent : reserved.back().extents())
        for (std::uint64_t n = 0; n < extent.run.count; ++n, ++next) {
            std::fill(bytes.begin(), bytes.end(), std::byte{0});
            tracked.bits.merge_into(bytes, *next * cluster);
            file_.write(bytes, geometry_.offset_of(extent.run.first + n));
            words.emplace_back(*next, extent.run.first + n);
        }
}

} // namespace qlean
