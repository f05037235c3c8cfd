// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "image.h"

#include "error.h"

#include <cassert>
#include <chrono>
#include <cstring>

namespace qlean {

namespace {

/// The most that one lock of the range lock covers: bounds how long a request keeps others out.
constexpr std::uint64_t data_chunk = 2 * 1024 * 1024;
constexpr std::uint64_t unmap_chunk_bytes = 32 * 1024 * 1024;
/// Below this a hole in the host file frees nothing.
constexpr std::uint64_t host_block = 4096;
constexpr std::uint64_t punch_step_bytes = 32 * 1024 * 1024;
constexpr std::uint64_t max_unreturned_bytes = 32 * 1024 * 1024;
constexpr std::uint64_t min_dirty_bytes = 128 * 1024;
constexpr auto commit_interval = std::chrono::seconds(5);
constexpr int max_commits_for_space = 4;

/// Calls f(first byte within the request, guest cluster, offset in cluster, bytes) for each cluster of a range.
template <class F>
void each_cluster(const Geometry &geometry, GuestOffset at, std::uint64_t length, F &&f) {
    for (std::uint64_t done = 0; done < length;) {
        const std::uint64_t within = geometry.within(at + done);
        const std::uint64_t n = std::min(length - done, geometry.cluster_size() - within);
        f(done, geometry.cluster_of(at + done), within, n);
        done += n;
    }
}

/// Bytes of memory for adjacent bytes of the file, joined as they are added, done when the next does not fit.
template <class Byte, class Io>
class Joined {
  public:
    explicit Joined(Io io) : io_(std::move(io)) {}
    void add(std::span<Byte> bytes, HostOffset at) {
        if (!bytes_.empty() && bytes_.data() + bytes_.size() == bytes.data() && at_ + bytes_.size() == at) {
            bytes_ = {bytes_.data(), bytes_.size() + bytes.size()};
            return;
        }
        finish();
        bytes_ = bytes;
        at_ = at;
    }
    void finish() {
        if (!bytes_.empty())
            io_(bytes_, at_);
        bytes_ = {};
    }

  private:
    Io io_;
    std::span<Byte> bytes_;
    HostOffset at_;
};

} // namespace

Image::Image(std::unique_ptr<State> state) : owner_(std::move(state)), state_(*owner_) {}

Image::~Image() {
    {
        const std::lock_guard guard(house_mutex_);
        house_stops_ = true;
    }
    house_wakes_.notify_all();
    if (house_.joinable())
        house_.join();
}

// --- reading ------------------------------------------------------------------------------------------------------

void Image::read(std::span<std::byte> into, GuestOffset at) {
    const Geometry &g = state_.geometry;
    std::vector<Mapping> mappings;
    while (!into.empty()) {
        const auto piece = into.first(std::min<std::uint64_t>(into.size(), data_chunk - at.value % data_chunk));
        const GuestCluster first = g.cluster_of(at);
        mappings.resize((g.cluster_of(at + (piece.size() - 1)) - first) + 1);
        const RangeLock::Shared guard(state_.ranges, at, piece.size());
        state_.mapper.resolve(first, mappings);
        Joined<std::byte, std::function<void(std::span<std::byte>, HostOffset)>> reads(
            [&](std::span<std::byte> bytes, HostOffset from) { state_.file.read(bytes, from); });
        each_cluster(g, at, piece.size(),
                     [&](std::uint64_t done, GuestCluster c, std::uint64_t within, std::uint64_t n) {
                         const Mapping &mapping = mappings[c - first];
                         if (mapping.kind == Mapping::Kind::data)
                             reads.add(piece.subspan(done, n), g.offset_of(mapping.host) + within);
                         else
                             std::memset(piece.data() + done, 0, n);
                     });
        reads.finish();
        into = into.subspan(piece.size());
        at += piece.size();
    }
}

std::vector<Image::Extent> Image::extents(GuestOffset at, std::uint64_t length, std::size_t most) {
    const Geometry &g = state_.geometry;
    std::vector<Extent> found;
    std::vector<Mapping> mappings;
    const GuestOffset end = at + length;
    while (at < end) {
        const GuestCluster first = g.cluster_of(at);
        GuestOffset stop = std::min(end, at + (unmap_chunk_bytes - at.value % unmap_chunk_bytes));
        const auto add = [&](GuestOffset from, GuestOffset to, bool allocated, bool zero) {
            if (!found.empty() && found.back().allocated == allocated && found.back().zero == zero)
                found.back().length += to - from;
            else
                found.push_back({from, to - from, allocated, zero});
        };
        if (!state_.mapper.has_table(first)) {
            // A table that appears meanwhile is a write that came after this answer.
            stop = std::min(end, g.offset_of(state_.mapper.table_end(first)));
            add(at, stop, false, true);
        } else {
            mappings.resize((g.cluster_of(stop - 1) - first) + 1);
            const RangeLock::Shared guard(state_.ranges, at, stop - at);
            state_.mapper.resolve(first, mappings);
            each_cluster(g, at, stop - at, [&](std::uint64_t done, GuestCluster c, std::uint64_t, std::uint64_t n) {
                const Mapping &m = mappings[c - first];
                add(at + done, at + (done + n), m.has_host(), m.reads_as_zeroes());
            });
        }
        at = stop;
        if (found.size() > most) {
            found.resize(most);
            break;
        }
    }
    return found;
}

void Image::prefetch(GuestOffset at, std::uint64_t length) {
    const Geometry &g = state_.geometry;
    const GuestOffset end = at + length;
    std::vector<Mapping> mappings;
    while (at < end) {
        const GuestOffset stop = std::min(end, at + (data_chunk - at.value % data_chunk));
        const GuestCluster first = g.cluster_of(at);
        mappings.resize((g.cluster_of(stop - 1) - first) + 1);
        const RangeLock::Shared guard(state_.ranges, at, stop - at);
        state_.mapper.resolve(first, mappings);
        each_cluster(g, at, stop - at, [&](std::uint64_t, GuestCluster c, std::uint64_t within, std::uint64_t n) {
            if (mappings[c - first].kind == Mapping::Kind::data)
                state_.file.will_need(g.offset_of(mappings[c - first].host) + within, n);
        });
        at = stop;
    }
}

// --- writing ------------------------------------------------------------------------------------------------------

/// No lock held.
void Image::before_change() {
    state_.write_back.before_change();
    // A guest that never flushes must not fill the memory: written back before any lock is taken.
    if (state_.l2.dirty_bytes() > std::max(state_.cache_bytes / 2, min_dirty_bytes))
        state_.write_back.commit(WriteBack::Give::later);
    if (state_.allocator.retired_bytes() > max_unreturned_bytes)
        house_wakes_.notify_one();
}

void Image::write(std::span<const std::byte> from, GuestOffset at) {
    const Geometry &g = state_.geometry;
    while (!from.empty()) {
        before_change();
        const GuestOffset table_end = g.offset_of(state_.mapper.table_end(g.cluster_of(at)));
        const auto piece =
            from.first(std::min<std::uint64_t>({from.size(), data_chunk - at.value % data_chunk, table_end - at}));
        {
            auto growth = Allocator::Growth::after_commit;
            std::uint64_t covered = state_.allocator.covered_end();
            for (int commits = 0;;) {
                bool full = false;
                try {
                    if (write_in_place(piece, at) || write_chunk(piece, at, growth) == Outcome::done)
                        break;
                } catch (const Error &error) {
                    if (error.kind() != Error::Kind::no_space || commits > 0)
                        throw;
                    full = true;
                }
                // Other writers may take what a commit made room for: only commits that gain nothing count.
                if (const auto now = state_.allocator.covered_end(); now > covered) {
                    covered = now;
                    commits = 0;
                }
                if (++commits > max_commits_for_space)
                    throw Error(Error::Kind::no_space, ENOSPC,
                                fmt::format("'{}' cannot grow any further", state_.file.name()));
                growth = Allocator::Growth::now;
                if (full)
                    give_back();
                else
                    state_.write_back.commit(WriteBack::Give::back);
            }
        }
        from = from.subspan(piece.size());
        at += piece.size();
    }
}

/// Writes where every cluster is the guest's own already; false, with nothing written, where one is not.
bool Image::write_in_place(std::span<const std::byte> from, GuestOffset at) {
    const Geometry &g = state_.geometry;
    const GuestCluster first = g.cluster_of(at);
    std::vector<Mapping> mappings((g.cluster_of(at + (from.size() - 1)) - first) + 1);
    const RangeLock::Shared guard(state_.ranges, at, from.size());
    state_.mapper.resolve(first, mappings);
    for (const Mapping &m : mappings)
        if (!m.writable_in_place())
            return false;
    Joined<const std::byte, std::function<void(std::span<const std::byte>, HostOffset)>> writes(
        [&](std::span<const std::byte> bytes, HostOffset to) { state_.file.write(bytes, to); });
    each_cluster(g, at, from.size(), [&](std::uint64_t done, GuestCluster c, std::uint64_t within, std::uint64_t n) {
        writes.add(from.subspan(done, n), g.offset_of(mappings[c - first].host) + within);
    });
    writes.finish();
    return true;
}

/// Writes within one L2 table, giving clusters to what has none of its own: account, write, then publish.
Image::Outcome Image::write_chunk(std::span<const std::byte> from, GuestOffset at, Allocator::Growth growth) {
    const Geometry &g = state_.geometry;
    const GuestCluster first = g.cluster_of(at);
    std::vector<Mapping> mappings((g.cluster_of(at + (from.size() - 1)) - first) + 1);
    const RangeLock::Exclusive guard(state_.ranges, at, from.size());
    state_.mapper.resolve(first, mappings);

    const auto reusable = [](const Mapping &m) { return m.kind == Mapping::Kind::zero_allocated && m.copied; };
    std::uint64_t wanted = 0;
    for (const Mapping &m : mappings)
        wanted += !m.writable_in_place() && !reusable(m);
    if (!state_.mapper.ensure_table(first, growth))
        return Outcome::commit_first;
    Allocator::Reservation reserved;
    if (wanted > 0) {
        reserved = state_.allocator.reserve(wanted, growth);
        if (reserved.empty())
            return Outcome::commit_first;
    }

    // Where each cluster goes, and whether what surrounds the guest's bytes there reads as zeroes already.
    struct Place {
        HostCluster host;
        bool zero;
    };
    std::vector<Place> places;
    places.reserve(mappings.size());
    auto extent = reserved.extents().begin();
    std::uint64_t used = 0;
    for (const Mapping &m : mappings) {
        if (m.writable_in_place() || reusable(m)) {
            places.push_back({m.host, false});
            continue;
        }
        places.push_back({extent->run.first + used, extent->zero});
        if (++used == extent->run.count) {
            ++extent;
            used = 0;
        }
    }

    Joined<const std::byte, std::function<void(std::span<const std::byte>, HostOffset)>> writes(
        [&](std::span<const std::byte> bytes, HostOffset to) { state_.file.write(bytes, to); });
    std::vector<std::byte> whole;
    each_cluster(g, at, from.size(), [&](std::uint64_t done, GuestCluster c, std::uint64_t within, std::uint64_t n) {
        const Mapping &m = mappings[c - first];
        const Place &place = places[c - first];
        const HostOffset to = g.offset_of(place.host);
        const bool covers = n == g.cluster_size();
        const bool needs_old = m.kind == Mapping::Kind::data && !m.copied;
        if (m.writable_in_place() || covers || (place.zero && !needs_old)) {
            writes.add(from.subspan(done, n), to + within);
            return;
        }
        // The rest of the cluster has to be written as well: what the guest saw there before, or zeroes.
        writes.finish();
        whole.assign(g.cluster_size(), std::byte{0});
        if (needs_old)
            state_.file.read(whole, g.offset_of(m.host));
        std::memcpy(whole.data() + within, from.data() + done, n);
        state_.file.write(whole, to);
    });
    writes.finish();

    std::vector<HostRun> replaced;
    {
        Mapper::Editor editor(state_.mapper, first, mappings.size());
        if (!editor.exists())
            return Outcome::commit_first; // the table was empty and has been given back meanwhile
        for (std::size_t i = 0; i < mappings.size(); ++i) {
            const Mapping &m = mappings[i];
            if (m.writable_in_place())
                continue;
            editor.set(first + i, entry::data(g.offset_of(places[i].host)));
            if (m.has_host() && m.host != places[i].host)
                append_run(replaced, {m.host, 1});
        }
    }
    reserved.publish();
    state_.allocator.retire(replaced);
    return Outcome::done;
}

// --- zeroing and trimming -----------------------------------------------------------------------------------------

template <class Edge, class Middle>
void Image::split(GuestOffset at, std::uint64_t length, Edge &&edge, Middle &&middle) {
    const Geometry &g = state_.geometry;
    const GuestOffset end = at + length;
    const GuestOffset disk_end{g.virtual_size()};
    const GuestOffset first{round_up(at.value, g.cluster_size())};
    // The last cluster of the disk may stick out of it: what covers the rest of the disk covers it whole.
    const GuestOffset last = end == disk_end ? end : GuestOffset{round_down(end.value, g.cluster_size())};
    if (first >= last && !(first == at && end == disk_end)) {
        if (g.cluster_of(at) == g.cluster_of(end - 1)) {
            edge(at, length);
        } else {
            edge(at, first - at);
            edge(first, end - first);
        }
        return;
    }
    if (at < first)
        edge(at, first - at);
    for (GuestOffset from = first; from < last;) {
        const GuestOffset table_end = g.offset_of(state_.mapper.table_end(g.cluster_of(from)));
        const GuestOffset chunk_end = from + (unmap_chunk_bytes - from.value % unmap_chunk_bytes);
        if (!state_.mapper.has_table(g.cluster_of(from))) {
            // Nothing there; a table that appears meanwhile is a write that comes after this request.
            from = std::min(last, table_end);
            continue;
        }
        const GuestOffset to = std::min({last, table_end, chunk_end});
        middle(from, to - from);
        from = to;
    }
    if (last < end)
        edge(last, end - last);
}

void Image::trim(GuestOffset at, std::uint64_t length) {
    if (length == 0)
        return;
    before_change();
    split(
        at, length, [&](GuestOffset from, std::uint64_t n) { trim_edge(from, n); },
        [&](GuestOffset from, std::uint64_t n) {
            before_change();
            unmap_chunk(from, n);
        });
}

void Image::zero(GuestOffset at, std::uint64_t length, Zero how, bool fast) {
    if (length == 0)
        return;
    before_change();
    split(
        at, length, [&](GuestOffset from, std::uint64_t n) { zero_edge(from, n, how, fast); },
        [&](GuestOffset from, std::uint64_t n) {
            before_change();
            if (how == Zero::may_trim)
                unmap_chunk(from, n);
            else
                zero_keeping_space(from, n, fast);
        });
}

/// Whole clusters within one table become unallocated, which reads as zeroes: there is no backing file.
void Image::unmap_chunk(GuestOffset at, std::uint64_t length) {
    const Geometry &g = state_.geometry;
    const GuestCluster first = g.cluster_of(at);
    const std::uint64_t count = (g.cluster_of(at + (length - 1)) - first) + 1;
    std::vector<HostRun> freed;
    const RangeLock::Exclusive guard(state_.ranges, at, length);
    {
        Mapper::Editor editor(state_.mapper, first, count);
        if (!editor.exists())
            return;
        // Judged before anything is changed, so that a damaged entry leaves the chunk as it was.
        std::vector<Mapping> mappings(count);
        for (std::uint64_t i = 0; i < count; ++i)
            mappings[i] = editor.get(first + i);
        for (std::uint64_t i = 0; i < count; ++i) {
            if (!mappings[i].has_host())
                continue;
            editor.set(first + i, 0);
            append_run(freed, {mappings[i].host, 1});
        }
    }
    state_.allocator.retire(freed);
}

void Image::zero_keeping_space(GuestOffset at, std::uint64_t length, bool fast) {
    const Geometry &g = state_.geometry;
    const GuestCluster first = g.cluster_of(at);
    std::vector<Mapping> mappings((g.cluster_of(at + (length - 1)) - first) + 1);
    std::vector<HostRun> runs;
    bool unshared = true;
    {
        const RangeLock::Exclusive guard(state_.ranges, at, length);
        state_.mapper.resolve(first, mappings);
        for (const Mapping &m : mappings) {
            if (m.kind != Mapping::Kind::data)
                continue;
            if (!m.copied) { // somebody else may own it too: let go of it instead of writing there
                unshared = false;
                break;
            }
            append_run(runs, {m.host, 1});
        }
        if (unshared)
            for (const HostRun &run : runs)
                zero_host(g.offset_of(run.first), g.bytes(run.count), Zero::keep_space, fast);
    }
    if (!unshared)
        unmap_chunk(at, length);
}

void Image::zero_host(HostOffset at, std::uint64_t length, Zero how, bool fast) {
    if (how == Zero::may_trim && state_.file.punch(at, length))
        return;
    if (state_.file.zero_keeping_space(at, length) || state_.file.punch(at, length))
        return;
    if (fast)
        throw Error(Error::Kind::unsupported, EOPNOTSUPP,
                    fmt::format("the file system of '{}' has no fast way to zero", state_.file.name()));
    state_.file.write_zeroes(at, length);
}

/// Part of one cluster.
void Image::zero_edge(GuestOffset at, std::uint64_t length, Zero how, bool fast) {
    const Geometry &g = state_.geometry;
    {
        const RangeLock::Exclusive guard(state_.ranges, at, length);
        Mapping m;
        state_.mapper.resolve(g.cluster_of(at), std::span(&m, 1));
        if (m.reads_as_zeroes())
            return;
        if (m.writable_in_place()) {
            zero_host(g.offset_of(m.host) + g.within(at), length, how, fast);
            return;
        }
    }
    // Shared with somebody: an ordinary write copies it.
    const std::vector<std::byte> zeroes(length);
    write(zeroes, at);
}

void Image::trim_edge(GuestOffset at, std::uint64_t length) {
    const Geometry &g = state_.geometry;
    const GuestOffset first{round_up(at.value, host_block)}, last{round_down(at.value + length, host_block)};
    if (first >= last)
        return;
    const RangeLock::Exclusive guard(state_.ranges, at, length);
    Mapping m;
    state_.mapper.resolve(g.cluster_of(at), std::span(&m, 1));
    if (!m.writable_in_place())
        return;
    try {
        state_.file.punch(g.offset_of(m.host) + g.within(first), last - first);
    } catch (const Error &) {
        // A trim is a hint: what the host cannot give back stays as it is.
    }
}

// --- durability and housekeeping ----------------------------------------------------------------------------------

void Image::flush() {
    if (!state_.read_only)
        state_.write_back.commit(WriteBack::Give::later);
}

void Image::give_back() {
    state_.write_back.commit(WriteBack::Give::back);
    while (state_.allocator.punch_step(punch_step_bytes)) {
    }
}

void Image::start_housekeeping() {
    if (!state_.read_only)
        house_ = std::thread([this] { keep_house(); });
}

void Image::keep_house() {
    std::unique_lock guard(house_mutex_);
    while (!house_stops_) {
        const auto deadline = std::chrono::steady_clock::now() + commit_interval;
        house_wakes_.wait_until(
            guard, deadline, [&] { return house_stops_ || state_.allocator.retired_bytes() > max_unreturned_bytes; });
        if (house_stops_)
            return;
        guard.unlock();
        try {
            if (!state_.write_back.poisoned()) {
                if (state_.write_back.anything_to_commit())
                    state_.write_back.commit(WriteBack::Give::back);
                while (state_.allocator.punch_step(punch_step_bytes)) {
                }
            }
        } catch (const std::exception &error) {
            if (report_)
                report_(error);
            std::this_thread::sleep_for(std::chrono::milliseconds(100));
        }
        guard.lock();
    }
}

void Image::close() {
    {
        const std::lock_guard guard(house_mutex_);
        house_stops_ = true;
    }
    house_wakes_.notify_all();
    if (house_.joinable())
        house_.join();
    if (state_.read_only || state_.write_back.poisoned())
        return;
    if (state_.write_back.commits() == 0 && !state_.write_back.anything_to_commit())
        return state_.write_back.commit(WriteBack::Give::later);
    give_back();
    // Only what was grown since: below that, a refcount of zero is believed only after a complete walk.
    while (state_.allocator.truncate_step(punch_step_bytes, HostCluster{state_.opened_end})) {
    }
    state_.write_back.lead([&] { state_.write_back.sync_as_leader(); });
}

} // namespace qlean
