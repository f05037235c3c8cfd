// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "survey.h"

#include "../error.h"
#include "snapshot_moves.h"

#include <deque>
#include <optional>
#include <shared_mutex>
#include <unordered_map>

namespace qlean {

namespace {

/// How often each host cluster is referred to, a byte each: beyond 254 it counts on in a map.
class ReferenceCounts {
  public:
    void add(HostRun run) {
        if (few_.size() < run.end().value)
            few_.resize(std::max<std::uint64_t>(run.end().value, few_.size() * 2));
        for (HostCluster c = run.first; c < run.end(); ++c) {
            std::uint8_t &few = few_[c.value];
            if (few < many)
                ++few;
            if (few == many)
                ++many_[c.value];
        }
    }
    std::uint64_t of(std::uint64_t c) const {
        if (c >= few_.size())
            return 0;
        return few_[c] < many ? few_[c] : many - 1 + many_.at(c);
    }
    std::uint64_t size() const { return few_.size(); }

  private:
    static constexpr std::uint8_t many = 255;
    std::vector<std::uint8_t> few_;
    std::unordered_map<std::uint64_t, std::uint64_t> many_;
};

/// Adjacent clusters whose refcount is wrong in the same way.
struct Miscount {
    HostRun run;
    std::uint64_t count, referrers;

    bool continues(std::uint64_t c, std::uint64_t its_count, std::uint64_t its_referrers) const {
        return run.end().value == c && count == its_count && referrers == its_referrers;
    }
};
/// An image may say anything of the clusters beyond the end of its file: of that much nothing is kept.
constexpr std::size_t most_miscounts = std::size_t{1} << 22;

/// Counts for the status page.
class Counter : public ReferenceVisitor {
  public:
    explicit Counter(State &state) : state_(state) {}

    void metadata(Kind kind, HostRun run) override {
        if (kind != Kind::shared_l2_table || set(seen_, run.first))
            survey.metadata += run.count;
    }
    void entry(GuestCluster, const Mapping &m) override {
        if (state_.mapper.format().external_data)
            return;
        if (m.kind == Mapping::Kind::compressed) {
            ++survey.compressed;
            ++survey.fragmented;
            add_packs(m);
        }
        if (!m.has_host())
            return;
        if (m.copied || !state_.snapshots.any() || set(seen_, m.host))
            ++survey.data;
        if (any_ && m.host != expected_)
            ++survey.fragmented;
        any_ = true;
        expected_ = m.host + 1;
    }
    void snapshot_entry(const Snapshot &, GuestCluster, const Mapping &m) override {
        if (m.kind == Mapping::Kind::compressed)
            add_packs(m);
        if (m.has_host() && set(seen_, m.host))
            ++survey.data;
    }
    void table_done(std::uint64_t i, bool empty) override {
        if (empty)
            survey.empty_tables.push_back(i);
    }

    Survey survey;

  protected:
    /// False: it was set before.
    static bool set(std::vector<bool> &bits, HostCluster c) {
        if (bits.size() <= c.value)
            bits.resize(std::max<std::uint64_t>(c.value + 1, bits.size() * 2));
        const bool is_new = !bits[c.value];
        bits[c.value] = true;
        return is_new;
    }

  private:
    void add_packs(const Mapping &m) {
        references_.clear();
        state_.mapper.append_references(references_, m);
        for (const HostRun &run : references_)
            for (HostCluster p = run.first; p < run.end(); ++p)
                survey.packs += set(packs_, p);
    }

    State &state_;
    std::vector<HostRun> references_;
    std::vector<bool> packs_; ///< by host cluster: holds compressed extents
    std::vector<bool> seen_;  ///< by host cluster: of what may be shared
    HostCluster expected_{0};
    bool any_ = false;
};

/// Counts, and remembers who refers to what.
class Auditor final : public Counter {
  public:
    explicit Auditor(State &state) : Counter(state), state_(state) {}

    void metadata(Kind kind, HostRun run) override {
        Counter::metadata(kind, run);
        references.add(run);
        for (HostCluster c = run.first; c < run.end() && kind != Kind::shared_l2_table; ++c)
            set(owned, c);
    }
    void entry(GuestCluster c, const Mapping &m) override {
        Counter::entry(c, m);
        if (state_.mapper.is_in_image(m)) { // nearly always
            references.add({m.host, 1});
            set(m.copied ? owned : unflagged, m.host);
            return;
        }
        if (m.kind == Mapping::Kind::damaged && !damaged)
            damaged = c;
        runs_.clear();
        state_.mapper.append_references(runs_, m);
        for (const HostRun &run : runs_)
            references.add(run);
        if (m.kind == Mapping::Kind::compressed && !runs_.empty()) {
            if (!survey.how_packed)
                survey.how_packed.emplace(state_.geometry, most_referrers(state_));
            survey.how_packed->add(entry::compressed_extent(m.bits, state_.geometry.cluster_bits()));
        }
    }
    void snapshot_entry(const Snapshot &snapshot, GuestCluster c, const Mapping &m) override {
        Counter::snapshot_entry(snapshot, c, m);
        if (m.kind == Mapping::Kind::damaged && !damaged)
            damaged = c;
        runs_.clear();
        state_.mapper.append_references(runs_, m);
        for (const HostRun &run : runs_)
            references.add(run);
        snapshots_have_packs = snapshots_have_packs || m.kind == Mapping::Kind::compressed;
    }

    ReferenceCounts references;
    std::vector<bool> owned;     ///< by somebody who may write there, so nobody else may refer to it
    std::vector<bool> unflagged; ///< by an entry of the active image without COPIED
    std::optional<GuestCluster> damaged;
    bool snapshots_have_packs = false;

  private:
    State &state_;
    std::vector<HostRun> runs_;
};

/// Adds what only snapshots have.
void add_snapshot_packs(State &state, const StopCheck &stop, Packs &packs) {
    const std::shared_lock guard(state.snapshots.lock());
    each_snapshot_mapping(state, stop, [&](GuestCluster, const Mapping &m) {
        if (m.kind == Mapping::Kind::compressed)
            packs.add(entry::compressed_extent(m.bits, state.geometry.cluster_bits()));
    });
}

} // namespace

Packs survey_packs(State &state, const StopCheck &stop) {
    class Packed final : public ReferenceVisitor {
      public:
        explicit Packed(const State &state)
            : packs(state.geometry, most_referrers(state)), bits_(state.geometry.cluster_bits()) {}
        void metadata(Kind, HostRun) override {}
        void entry(GuestCluster, const Mapping &m) override {
            if (m.kind == Mapping::Kind::compressed)
                packs.add(entry::compressed_extent(m.bits, bits_));
        }
        void snapshot_entry(const Snapshot &, GuestCluster, const Mapping &) override {}
        void table_done(std::uint64_t, bool) override {}
        Packs packs;

      private:
        unsigned bits_;
    } packed(state);
    walk_active(state, stop, packed);
    if (state.snapshots.any())
        add_snapshot_packs(state, stop, packed.packs);
    return std::move(packed.packs);
}

Survey survey_image(State &state, const StopCheck &stop) {
    Counter counter(state);
    walk_references(state, stop, counter);
    return std::move(counter.survey);
}

Survey verify_image(State &state, const Allocator::Watch &watch, const StopCheck &stop) {
    // What was reserved when the watch began, or is taken or retired since, is left out of the comparison. All else
    // was published before, and this commit brings its refcount to the file, or was retired, and this lowers it.
    if (!state.read_only) {
        state.ranges.drain();
        state.write_back.commit(WriteBack::Give::back);
    }

    Auditor audit(state);
    walk_references(state, stop, audit);
    const ReferenceCounts &references = audit.references;

    const auto &name = state.file.name();
    const auto refuse = [&](const std::string &what) {
        throw_bad_image("'{}' is damaged, so nothing of it is moved or freed: {}; stop the server and repair it with "
                        "'qemu-img check -r all'",
                        name, what);
    };
    std::deque<Miscount> too_many, too_few; // unlike a vector, these do not take half as much again while they grow
    const auto note = [&](std::deque<Miscount> &miscounts, std::uint64_t c, std::uint64_t count,
                          std::uint64_t referrers) {
        if (!miscounts.empty() && miscounts.back().continues(c, count, referrers))
            ++miscounts.back().run.count;
        else if (too_many.size() + too_few.size() < most_miscounts)
            miscounts.push_back({{{c}, 1}, count, referrers});
        else
            refuse(fmt::format("more than {} stretches of it have wrong refcounts", most_miscounts));
    };
    std::uint64_t counted_end = 0;
    const std::uint64_t region_clusters = state.refcounts.region_clusters();
    // Regions without a block lie in between: nothing there is counted.
    bool uncounted_are_nobodys = true;
    const auto uncounted = [&](std::uint64_t from, std::uint64_t to) {
        for (std::uint64_t c = from; c < std::min(to, references.size()); ++c)
            if (const std::uint64_t referrers = references.of(c)) {
                uncounted_are_nobodys = false; // also if it turns out to have changed meanwhile
                note(too_few, c, 0, referrers);
            }
    };
    // Counts of what lies beyond the end of the file mean nothing: the allocator knows no such clusters.
    const std::uint64_t end = state.allocator.end();
    for (const auto &[region, block] : state.refcounts.blocks()) {
        const std::uint64_t first = region * region_clusters;
        if (first >= end)
            break;
        require_going(stop);
        uncounted(counted_end, first);
        state.refcounts.read_block(region, [&](std::uint64_t i, std::uint64_t count) {
            const std::uint64_t referrers = references.of(first + i);
            if (count < referrers)
                note(too_few, first + i, count, referrers);
            if (count > referrers)
                note(too_many, first + i, count, referrers);
        });
        counted_end = first + region_clusters;
    }
    uncounted(counted_end, references.size());

    // Who unlinks holds the range until it has retired, too: without waiting for that, what the walk saw unlinked would
    // pass for a leak, be retired twice, and be given away while its next owner uses it.
    state.ranges.drain();
    const auto changed = watch.touched();
    const auto is_changed = [&](std::uint64_t c) { return c < changed.size() && changed[c]; };
    if (audit.damaged)
        refuse(fmt::format("the L2 entry of guest offset {:#x} is not valid",
                           state.geometry.offset_of(*audit.damaged).value));
    for (const auto &[run, count, referrers] : too_few)
        for (std::uint64_t c = run.first.value; c < run.end().value; ++c) {
            if (is_changed(c))
                continue;
            if (count == 0)
                refuse(fmt::format("host cluster {} is in use, but has no refcount", c));
            refuse(fmt::format("host cluster {} is used {}, but has a refcount of {}", c,
                               referrers == 2 ? std::string("twice") : fmt::format("{} times", referrers), count));
        }
    for (std::uint64_t c = 0; c < audit.owned.size(); ++c)
        if (audit.owned[c] && references.of(c) > 1 && !is_changed(c))
            refuse(fmt::format("host cluster {} is used twice, and one of its users may write there", c));
    const bool may_free = !state.header.header().has_unknown_extension();
    Survey survey = std::move(audit.survey);
    survey.uncounted_are_nobodys = uncounted_are_nobodys && may_free;
    if (audit.snapshots_have_packs) {
        if (!survey.how_packed)
            survey.how_packed.emplace(state.geometry, most_referrers(state));
        add_snapshot_packs(state, stop, *survey.how_packed);
    }
    for (const auto &[run, count, referrers] : too_many)
        for (HostCluster c = run.first; c < run.end(); ++c) {
            if (is_changed(c.value))
                continue;
            // Of what snapshots shared, or of a pack that was being filled or emptied, when a server was killed.
            const bool gives_back = may_free && survey.surplus.add(c, count - std::max<std::uint64_t>(referrers, 1));
            if (referrers == 0)
                append_run(gives_back ? survey.leaked : survey.pinned, {c, 1});
        }
    for (std::uint64_t c = 0; c < audit.unflagged.size() && !survey.lacks_copied_flags; ++c)
        survey.lacks_copied_flags = audit.unflagged[c] && references.of(c) == 1;
    for (std::uint64_t i = 0; i < state.l1.size() && !survey.lacks_copied_flags; ++i)
        if (const std::uint64_t word = state.l1.word(i); word != 0 && (word & entry::copied) == 0)
            survey.lacks_copied_flags = references.of(state.geometry.cluster_of(entry::table(word)).value) == 1;
    return survey;
}

} // namespace qlean
