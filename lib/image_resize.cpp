// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Growing the disk of an image that is open. Nothing else is running: no request, no housekeeping, no operation.
//
// The size in the header is the last thing that changes, in one write of one sector. Before it everything that the new
// size relies on is durable: an L1 table that is long enough, zeroes in the new area wherever something else would show
// there (what lies below, entries that were left beyond the end), tables of bitmaps. A power cut before that write
// leaves a disk of the old size, with a longer L1 table at worst.
//
// The parts of the image know the size by value, so they are made anew, in the same place: whoever holds a reference to
// the State goes on with it. What they are made from is taken from the old ones, or (the L1 table) read as long as
// those are there: then no I/O can fail on the way.
#include "adjacent.h"
#include "error.h"
#include "image.h"

#include <cstdio>
#include <unistd.h>

namespace qlean {

namespace {

constexpr std::uint64_t max_virtual_size = std::uint64_t{1} << 62;
constexpr std::uint64_t unit = 512;

[[noreturn]] void refuse(const State &state, const std::string &why) {
    throw Error(Error::Kind::denied, EPERM, fmt::format("'{}' is not resized: {}", state.file.name(), why));
}

/// The L1 table gets a new home with room for `entries`; nothing of it is dirty. As leader; durable when it returns.
/// The parts have to be made anew then.
void grow_l1_table(State &state, std::uint64_t entries) {
    state.write_back.move_l1_as_leader(reserve_adjacent(state, state.geometry.clusters_for(entries * 8)), entries);
}

/// What the parts were made from, as it is now, for a disk of `size` bytes. The L1 table is the file's: in memory it
/// may have what was not committed, which may stand for a table that is shared; and it may be shorter.
Opened made_from(State &state, std::uint64_t size) {
    Header header = state.header.header();
    std::vector<std::uint64_t> l1(header.l1_size);
    state.file.read(std::as_writable_bytes(std::span(l1)), header.l1_offset);
    auto table = state.refcounts.table_words(0, state.refcounts.table_entries());
    auto sector = state.header.sector();
    return {.file = state.file_owner,
            .data = state.data_owner,
            .backing = state.backing,
            .header = std::move(header),
            .encryption_header = state.encryption_header,
            .header_sector = std::move(sector),
            .l1_words = std::move(l1),
            .refcount_table = std::move(table),
            .snapshots = state.snapshots.loaded(),
            .end = state.allocator.end(),
            .read_only = state.read_only,
            .cache_bytes = state.cache_bytes,
            .bitmaps =
                state.bitmaps && state.bitmaps->count() ? std::optional(state.bitmaps->directory()) : std::nullopt,
            .virtual_size = size};
}

} // namespace

/// The parts of the image again, for a disk of `size` bytes. What was not committed is gone, as after a crash.
void Image::make_anew(std::uint64_t size) {
    Opened opened = made_from(state_, size);
    // One beside it first: what cannot be made, of a damaged image or for lack of memory, shows while there is the old.
    { const State trial(opened); }
    State *const place = owner_.get();
    const auto replace = [&]() noexcept {
        try {
            std::destroy_at(place);
            std::construct_at(place, std::move(opened));
        } catch (...) {
            // Half an image must not serve anybody. The file is consistent.
            std::fputs("qlean: no memory left while resizing an image; the server ends\n", stderr);
            ::_exit(EXIT_FAILURE);
        }
    };
    replace();
    hook_up();
}

void Image::require_resizable(std::uint64_t size) const {
    const State &state = state_;
    if (state.read_only)
        refuse(state, "it is served read-only");
    const Header header = state.header.header();
    const std::uint64_t now = state.geometry.virtual_size();
    if (size < now)
        refuse(state, fmt::format("its disk has {} bytes, and making it smaller would cut off what is in use; shrink "
                                  "the file system and make a smaller copy instead",
                                  now));
    if (size % unit != 0)
        refuse(state, fmt::format("{} bytes is not a multiple of {}", size, unit));
    Header wanted = header;
    wanted.virtual_size = size;
    if (size > max_virtual_size || wanted.geometry().l1_entries() * 8 > Header::max_l1_bytes)
        refuse(state,
               fmt::format("a disk of {} bytes needs an L1 table of more than 32 MiB; use larger clusters", size));
    if (header.version < 3 && header.snapshot_count != 0)
        refuse(state, "an image of version 2 does not remember what size its snapshots have; delete them first");
    if (state.bitmaps)
        state.bitmaps->require_resizable(wanted.geometry());
}

void Image::resize(std::uint64_t size) {
    require_resizable(size);
    const std::uint64_t old_size = state_.geometry.virtual_size();
    if (size == old_size)
        return;
    const bool kept_house = house_.joinable();
    stop_housekeeping();
    struct Resumes {
        Image &image;
        bool wanted;
        ~Resumes() {
            if (wanted)
                image.start_housekeeping();
        }
    } const resumes{*this, kept_house};

    state_.write_back.before_change();
    give_back();
    if (state_.bitmaps)
        state_.bitmaps->store();
    Header wanted = state_.header.header();
    wanted.virtual_size = size;
    state_.data.grow_disk(old_size, size);
    const auto grow = [&] {
        if (const std::uint64_t entries = wanted.geometry().l1_entries(); entries > state_.l1.size()) {
            state_.write_back.lead([&] { grow_l1_table(state_, entries); });
            give_back();
        }
        make_anew(size);
        if (state_.bitmaps)
            state_.bitmaps->pause(true);
        zero_beyond(old_size);
        give_back();
        std::vector<std::size_t> grown;
        state_.write_back.lead([&] {
            if (state_.bitmaps)
                grown = state_.bitmaps->grow_tables([&](std::uint64_t n) { return reserve_adjacent(state_, n); });
            state_.write_back.switch_as_leader(
                [&] { state_.header.update([&](Header &h) { h.virtual_size = size; }); });
        });
        return grown;
    };
    std::vector<std::size_t> grown;
    try {
        grown = grow();
    } catch (...) {
        // What is in the header by now may be more than the parts know: they are made for that.
        if (!state_.write_back.poisoned()) {
            try {
                give_back();
            } catch (const std::exception &) {
                // What was allocated on the way is leaked then.
            }
            try {
                make_anew(old_size);
            } catch (const std::exception &) {
                // Parts that do not know how long the L1 table is must not write any more.
                state_.write_back.lead([&] { state_.write_back.poison_as_leader(); });
            }
        }
        throw;
    }
    if (!state_.bitmaps)
        return;
    try {
        state_.write_back.lead([&] { state_.bitmaps->tables_grown(grown); });
    } catch (const std::exception &error) {
        report(error); // they stay inconsistent; the disk has its new size
    }
    state_.bitmaps->pause(false);
}

/// What the disk shows from `old_size` on becomes zeroes, where it might be anything else.
void Image::zero_beyond(std::uint64_t old_size) {
    const Geometry &g = state_.geometry;
    const std::uint64_t below = std::clamp(state_.backing ? state_.backing->size() : 0, old_size, g.virtual_size());
    if (below > old_size)
        zero({old_size}, below - old_size, Zero::may_trim, false);
    const std::uint64_t table_bytes = g.bytes(g.l2_entries());
    for (std::uint64_t i = below / table_bytes; i < g.l1_entries(); ++i) {
        if (state_.l1.table(i).value == 0)
            continue;
        const std::uint64_t from = std::max(below, i * table_bytes);
        const std::uint64_t to = std::min(g.virtual_size(), (i + 1) * table_bytes);
        if (from < to)
            zero({from}, to - from, Zero::may_trim, false);
    }
}

} // namespace qlean
