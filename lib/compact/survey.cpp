// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "survey.h"

#include "../error.h"

namespace qlean {

namespace {

constexpr std::uint64_t batch = 8192;

/// References found so far, one bit per host cluster; a second one to the same cluster goes to `twice`.
class References {
  public:
    void add(HostCluster c) {
        if (seen_.size() <= c.value)
            seen_.resize(std::max(c.value + 1, seen_.size() * 2));
        if (seen_[c.value])
            twice_.push_back(c);
        seen_[c.value] = true;
    }
    bool has(std::uint64_t c) const { return c < seen_.size() && seen_[c]; }
    const std::vector<HostCluster> &twice() const { return twice_; }
    std::uint64_t size() const { return seen_.size(); }

  private:
    std::vector<bool> seen_;
    std::vector<HostCluster> twice_;
};

/// Walks everything; `reference(cluster)` for each use of a host cluster, `damaged(guest)` for an impossible entry.
template <class Reference, class Damaged>
Survey walk(State &state, const StopCheck &stop, Reference &&reference, Damaged &&damaged) {
    const Geometry &g = state.geometry;
    Survey survey;
    const auto metadata = [&](HostRun run) {
        survey.metadata += run.count;
        for (std::uint64_t i = 0; i < run.count; ++i)
            reference(run.first + i);
    };
    // Taken between commits, for only their leader moves these.
    std::vector<HostRun> fixed;
    state.write_back.lead([&] {
        fixed.push_back({{0}, 1});
        if (state.l1.size() > 0)
            fixed.push_back({g.cluster_of(state.l1.home()), g.clusters_for(state.l1.size() * 8)});
        fixed.push_back({g.cluster_of(state.refcounts.home()), state.refcounts.table_clusters()});
        for (const auto &[region, cluster] : state.refcounts.blocks())
            fixed.push_back({cluster, 1});
    });
    for (const HostRun &run : fixed)
        metadata(run);

    std::vector<Mapping> mappings;
    HostCluster expected{0};
    bool any = false;
    for (std::uint64_t i = 0; i < state.l1.size(); ++i) {
        const HostOffset table = state.l1.table(i);
        if (table.value == 0)
            continue;
        require_going(stop);
        metadata({g.cluster_of(table), 1});
        // All of it: entries beyond the end of the disk (VM state, a disk that was shrunk) hold clusters too.
        const std::uint64_t first = i * g.l2_entries(), end = first + g.l2_entries();
        bool empty = true;
        for (std::uint64_t at = first; at < end; at += batch) {
            mappings.resize(std::min(batch, end - at));
            state.mapper.survey({at}, mappings);
            for (std::size_t n = 0; n < mappings.size(); ++n) {
                const Mapping &m = mappings[n];
                if (m.kind == Mapping::Kind::damaged || m.kind == Mapping::Kind::compressed)
                    damaged(GuestCluster{at + n});
                if (m.kind != Mapping::Kind::unallocated && m.kind != Mapping::Kind::zero)
                    empty = false;
                if (!m.has_host())
                    continue;
                reference(m.host);
                ++survey.data;
                if (any && m.host != expected)
                    ++survey.fragmented;
                any = true;
                expected = m.host + 1;
            }
        }
        if (empty)
            survey.empty_tables.push_back(i);
    }
    return survey;
}

} // namespace

Survey survey_image(State &state, const StopCheck &stop) {
    return walk(
        state, stop, [](HostCluster) {}, [](GuestCluster) {});
}

Survey verify_image(State &state, const Allocator::Watch &watch, const StopCheck &stop) {
    // What was reserved when the watch began, or is taken or retired since, is left out of the comparison. All else
    // was published before, and this commit brings its refcount to the file, or was retired, and this lowers it; what
    // is unlinked but not retired yet is so within somebody's range.
    if (!state.read_only) {
        state.ranges.drain();
        state.write_back.commit(WriteBack::Give::back);
    }

    References references;
    std::vector<GuestCluster> damaged;
    Survey survey = walk(
        state, stop, [&](HostCluster c) { references.add(c); }, [&](GuestCluster c) { damaged.push_back(c); });

    struct Miscount {
        std::uint64_t cluster, count;
    };
    std::vector<Miscount> unreferenced;
    std::vector<std::uint64_t> uncounted;
    std::uint64_t counted_end = 0;
    const std::uint64_t region_clusters = state.refcounts.region_clusters();
    for (const auto &[region, block] : state.refcounts.blocks()) {
        const std::uint64_t first = region * region_clusters;
        // Regions without a block lie in between: nothing there is counted.
        for (std::uint64_t c = counted_end; c < std::min(first, references.size()); ++c)
            if (references.has(c))
                uncounted.push_back(c);
        state.refcounts.read_block(region, [&](std::uint64_t i, std::uint64_t count) {
            if (count == 0 && references.has(first + i))
                uncounted.push_back(first + i);
            if (count > 0 && !references.has(first + i))
                unreferenced.push_back({first + i, count});
        });
        counted_end = first + region_clusters;
    }
    for (std::uint64_t c = counted_end; c < references.size(); ++c)
        if (references.has(c))
            uncounted.push_back(c);

    const auto changed = watch.touched();
    const auto is_changed = [&](std::uint64_t c) { return c < changed.size() && changed[c]; };
    const auto &name = state.file.name();
    const auto refuse = [&](const std::string &what) {
        throw_bad_image("'{}' is damaged, so nothing of it is moved: {}; stop the server and repair it with "
                        "'qemu-img check -r all'",
                        name, what);
    };
    if (!damaged.empty())
        refuse(fmt::format("the L2 entry of guest offset {:#x} is not valid",
                           state.geometry.offset_of(damaged.front()).value));
    for (const HostCluster c : references.twice())
        if (!is_changed(c.value))
            refuse(fmt::format("host cluster {} is used twice", c.value));
    for (const std::uint64_t c : uncounted)
        if (!is_changed(c))
            refuse(fmt::format("host cluster {} is in use, but has no refcount", c));
    const bool may_free = !state.header.header().has_unknown_extension();
    for (const auto &[cluster, count] : unreferenced) {
        if (is_changed(cluster))
            continue;
        append_run(may_free && count == 1 ? survey.leaked : survey.pinned, {{cluster}, 1});
    }
    return survey;
}

} // namespace qlean
