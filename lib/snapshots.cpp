// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "snapshots.h"

#include "byte_order.h"
#include "error.h"

#include <algorithm>
#include <set>
#include <shared_mutex>

namespace qlean {

namespace {

/// Bytes of L1 tables of all snapshots together that are kept in memory.
constexpr std::uint64_t max_all_l1_bytes = std::uint64_t{512} * 1024 * 1024;

/// The table, without reading more of the file than a table of so many snapshots is likely to be.
SnapshotTable read_table(File &file, const Header &header, std::uint64_t length, std::uint64_t *bytes_used) {
    const Geometry geometry = header.geometry();
    const HostOffset at = header.snapshots_offset;
    if (at.value == 0 || at.value % geometry.cluster_size() != 0 || at.value >= length)
        throw_bad_image("'{}' is damaged: its snapshot table is at the impossible offset {:#x}; see 'qemu-img check'",
                        file.name(), at.value);
    const std::uint64_t available = std::min(length - at.value, SnapshotTable::max_bytes);
    // The number may be a lie.
    std::uint64_t size = std::min(available, 4096 + std::uint64_t{std::min(header.snapshot_count, 1024u)} * 512);
    for (;;) {
        std::vector<std::byte> bytes(size);
        file.read(bytes, at);
        try {
            return SnapshotTable::decode(bytes, header.snapshot_count, geometry, file.name(), bytes_used);
        } catch (const Error &) {
            // Reading more helps if it is the end of what was read that the entry runs into.
            if (size == available || size - *bytes_used >= SnapshotTable::longest_entry)
                throw;
            size = std::min(available, size * 2 + SnapshotTable::longest_entry);
        }
    }
}

std::vector<std::uint64_t> read_l1(File &file, const Geometry &geometry, const SnapshotEntry &entry,
                                   std::uint64_t length) {
    const auto damaged = [&](const std::string &what) {
        throw_bad_image("'{}' is damaged: the L1 table of snapshot '{}' {}; see 'qemu-img check'", file.name(),
                        entry.name, what);
    };
    std::vector<std::uint64_t> words(entry.l1_size);
    if (words.empty())
        return words;
    if (entry.l1_offset.value > length || words.size() * 8 > length - entry.l1_offset.value)
        damaged(fmt::format("at {:#x} lies beyond the end of the file ({} bytes)", entry.l1_offset.value, length));
    file.read(std::as_writable_bytes(std::span(words)), entry.l1_offset);
    for (std::size_t i = 0; i < words.size(); ++i) {
        words[i] = big_endian(words[i]);
        if (words[i] == 0)
            continue;
        const HostOffset table = entry::table(words[i]);
        if (!entry::valid_l1(words[i], geometry.cluster_bits()) || table.value >= length)
            damaged(fmt::format("has {:#x} as its entry {}, which is no valid table", words[i], i));
    }
    return words;
}

} // namespace

Snapshot::Snapshot(SnapshotEntry entry, std::vector<std::uint64_t> l1_words, std::uint64_t image_size)
    : entry_(std::move(entry)), disk_size_(entry_.disk_size(image_size)), l1_size_(l1_words.size()),
      l1_(std::make_unique<std::atomic<std::uint64_t>[]>(l1_words.size())), l1_home_(entry_.l1_offset) {
    for (std::size_t i = 0; i < l1_words.size(); ++i)
        l1_[i].store(l1_words[i], std::memory_order_relaxed);
}

Snapshots::Loaded Snapshots::load(File &file, const Header &header, std::uint64_t length) {
    Loaded loaded;
    if (header.snapshot_count == 0)
        return loaded;
    const Geometry geometry = header.geometry();
    loaded.home = header.snapshots_offset;
    const SnapshotTable table = read_table(file, header, length, &loaded.bytes);
    std::uint64_t l1_bytes = 0;
    std::set<HostOffset> homes{header.l1_offset};
    for (const SnapshotEntry &entry : table.entries) {
        l1_bytes += std::uint64_t{entry.l1_size} * 8;
        if (l1_bytes > max_all_l1_bytes)
            throw Error(Error::Kind::unsupported, ENOTSUP,
                        fmt::format("'{}' cannot be opened: the L1 tables of its snapshots are larger than {} MiB in "
                                    "all; delete some with 'qemu-img snapshot -d'",
                                    file.name(), max_all_l1_bytes >> 20));
        if (l1_bytes > length) // or some would have to lie on top of others
            throw_bad_image("'{}' is damaged: the L1 tables of its snapshots are larger than the file; see 'qemu-img "
                            "check'",
                            file.name());
        if (entry.l1_size != 0 && !homes.insert(entry.l1_offset).second)
            throw_bad_image(
                "'{}' is damaged: the L1 table of snapshot '{}' at {:#x} is used twice; see 'qemu-img check'",
                file.name(), entry.name, entry.l1_offset.value);
        loaded.list.push_back(
            std::make_shared<Snapshot>(entry, read_l1(file, geometry, entry, length), header.virtual_size));
    }
    return loaded;
}

Snapshots::Snapshots(const Geometry &geometry, File &file, const SyncLog &syncs, L1Table &l1, Loaded loaded)
    : pending(file, syncs), geometry_(geometry), l1_(l1), any_(!loaded.list.empty()), home_(loaded.home),
      bytes_(loaded.bytes) {
    for (std::size_t i = 0; i < loaded.list.size(); ++i)
        listed_.push_back({std::move(loaded.list[i]), i < loaded.users.size() ? loaded.users[i] : 0});
}

Snapshots::Loaded Snapshots::loaded() const {
    const Lock guard(mutex_);
    Loaded loaded{{}, home_, bytes_};
    for (const Listed &listed : listed_) {
        loaded.list.push_back(listed.snapshot);
        loaded.users.push_back(listed.users);
    }
    return loaded;
}

std::vector<SnapshotPointer> Snapshots::list() const {
    const Lock guard(mutex_);
    std::vector<SnapshotPointer> all;
    for (const Listed &listed : listed_)
        all.push_back(listed.snapshot);
    return all;
}

HostRun Snapshots::table_run() const {
    const Lock guard(mutex_);
    return {geometry_.cluster_of(home_), geometry_.clusters_for(bytes_)};
}

void Snapshots::each_metadata_run(const VisitRun &visit) const {
    if (const HostRun table = table_run(); table.count != 0)
        visit(table);
    for (const SnapshotPointer &snapshot : list()) {
        if (snapshot->l1_size() != 0)
            visit(snapshot->l1_run(geometry_));
        for (std::uint64_t i = 0; i < snapshot->l1_size(); ++i)
            if (const HostOffset table = snapshot->table(i); table.value != 0)
                visit({geometry_.cluster_of(table), 1});
    }
}

void Snapshots::read(const Snapshot &snapshot, GuestCluster first, std::span<std::uint64_t> out) {
    const std::uint64_t entries = geometry_.l2_entries(), words = geometry_.entry_words();
    while (!out.empty()) {
        const std::uint64_t i = geometry_.l1_index(first), within = geometry_.l2_index(first);
        const auto piece = out.first(std::min<std::uint64_t>(out.size(), (entries - within) * words));
        {
            // The table stays where it is while it is read.
            const std::shared_lock guard(l1_.lock(i));
            if (const HostOffset table = snapshot.table(i); table.value != 0)
                pending.read(table + within * words * 8, piece);
            else
                std::fill(piece.begin(), piece.end(), 0);
        }
        out = out.subspan(piece.size());
        first += piece.size() / words;
    }
}

// --- who uses which -----------------------------------------------------------------------------------------------

std::vector<Snapshots::Listed>::iterator Snapshots::position(const std::string &name_or_id) {
    const auto by_name = std::find_if(listed_.begin(), listed_.end(), [&](const Listed &listed) {
        return listed.snapshot->entry().name == name_or_id;
    });
    if (by_name != listed_.end())
        return by_name;
    return std::find_if(listed_.begin(), listed_.end(),
                        [&](const Listed &listed) { return listed.snapshot->entry().id == name_or_id; });
}

std::optional<Snapshots::Use> Snapshots::use(const std::string &name_or_id) {
    const Lock guard(mutex_);
    const auto found = position(name_or_id);
    if (found == listed_.end() || found->closed)
        return std::nullopt;
    ++found->users;
    return Use(this, found->snapshot);
}

Snapshots::Use::~Use() {
    if (owner_ == nullptr)
        return;
    const Lock guard(owner_->mutex_);
    for (Listed &listed : owner_->listed_)
        if (listed.snapshot == snapshot_)
            --listed.users;
}

SnapshotPointer Snapshots::find(const std::string &name_or_id) const {
    const Lock guard(mutex_);
    const auto found = const_cast<Snapshots *>(this)->position(name_or_id);
    return found == listed_.end() ? nullptr : found->snapshot;
}

// --- deleting and moving ------------------------------------------------------------------------------------------

bool Snapshots::close_for_use(const SnapshotPointer &snapshot) {
    const Lock guard(mutex_);
    for (Listed &listed : listed_)
        if (listed.snapshot == snapshot && listed.users == 0) {
            listed.closed = true;
            return true;
        }
    return false;
}

void Snapshots::reopen_for_use(const SnapshotPointer &snapshot) {
    const Lock guard(mutex_);
    for (Listed &listed : listed_)
        if (listed.snapshot == snapshot)
            listed.closed = false;
}

SnapshotTable Snapshots::table_without(const Snapshot *gone) const {
    SnapshotTable table;
    for (const SnapshotPointer &snapshot : list()) {
        if (snapshot.get() == gone)
            continue;
        table.entries.push_back(snapshot->entry());
        table.entries.back().l1_offset = snapshot->l1_home();
    }
    return table;
}

void Snapshots::moved(HostOffset home, std::uint64_t bytes, const Snapshot *gone) {
    const Lock guard(mutex_);
    home_ = home;
    bytes_ = bytes;
    std::erase_if(listed_, [&](const Listed &listed) { return listed.snapshot.get() == gone; });
}

} // namespace qlean
