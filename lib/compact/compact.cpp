// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "compact.h"

namespace qlean {

namespace {

/// Work between commits: bounds the space used on the way and how long a guest's flush can take.
constexpr std::uint64_t max_moved_bytes = 32 * 1024 * 1024;
constexpr std::uint64_t min_moved_bytes = 1024 * 1024;
constexpr std::uint64_t ideal_share = 116;

} // namespace

Compact::Compact(Image &image, MoveOwnership &ownership, Gauges &gauges, std::uint64_t connection, std::uint64_t most)
    : image_(image), state_(image.state()), ownership_(ownership), gauges_(gauges), connection_(connection),
      most_(std::max<std::uint64_t>(most / state_.geometry.cluster_size(), 1)), repacker_(image),
      uncommitted_([&image] { image.give_back(); }) {}

Compact::~Compact() {
    uncommitted_.stop();
    try {
        if (repacker_.close() || uncommitted_.any_moved())
            image_.give_back();
    } catch (...) {
        // The background commit tries again and reports.
    }
    ownership_.release(connection_);
}

/// The walk that everything relies on, once per connection.
void Compact::prepare(const StopCheck &stop) {
    const Lock guard(mutex_);
    if (prepared_)
        return;
    auto watch = std::make_unique<Allocator::Watch>(state_.allocator);
    Survey survey = verify_image(state_, *watch, stop);
    leaked_ = std::move(survey.leaked);
    surplus_ = std::move(survey.surplus);
    pinned_ = cluster_count(survey.pinned);
    gauges_.pinned = static_cast<std::int64_t>(pinned_);
    empty_tables_ = {survey.empty_tables.begin(), survey.empty_tables.end()};
    if (survey.uncounted_are_nobodys)
        state_.allocator.uncounted_are_nobodys();
    lacks_copied_flags_ = survey.lacks_copied_flags || !surplus_.empty();
    if (!leaked_.empty() || !surplus_.empty())
        watch_ = std::move(watch);
    state_.allocator.load_all();
    has_packs_ = survey.how_packed.has_value();
    if (has_packs_)
        measure_packs(*survey.how_packed);
    else
        measure();
    if (state_.snapshots.any())
        look_at_snapshots(stop);
    // A free tail, such as a killed server leaves, is worth a FLUSH even if nothing moves; so are counts that are too
    // high and flags that are missing.
    if (!surplus_.empty() || lacks_copied_flags_ || has_free_tail())
        gauges_.pending = static_cast<std::int64_t>(++layout_.pending);
    prepared_ = true;
}

/// The leaks that are still what the walk found: another connection may have given them back meanwhile, and the guest
/// may be using them. With mutex_ held, as the owner.
void Compact::retire_leaked(const StopCheck &stop) {
    if (!watch_)
        return;
    std::vector<HostRun> still;
    for (const HostRun &run : std::exchange(leaked_, {}))
        for (std::uint64_t i = 0; i < run.count; ++i)
            if (const HostCluster c = run.first + i; !watch_->touched(c))
                append_run(still, {c, 1});
    surplus_.drop_if([watch = watch_.get()](HostCluster c) { return watch->touched(c); });
    state_.allocator.retire(still);
    std::exchange(surplus_, {}).retire(state_.allocator, [&] {
        require_going(stop);
        image_.give_back();
    });
    watch_.reset();
}

/// With mutex_ held: what Layout::measure counts anew, or knows to go.
std::uint64_t Compact::taken_out_of_live() const {
    return state_.refcounts.blocks().size() + state_.refcounts.table_clusters() + cluster_count(leaked_) +
           empty_tables_.size();
}

/// With mutex_ held.
bool Compact::has_free_tail() const {
    return state_.allocator.highest_in_use({0}).value < state_.allocator.end() || state_.allocator.ends_uncounted();
}

/// With mutex_ held.
std::uint64_t Compact::live() const {
    const std::uint64_t all = state_.allocator.counts().live();
    return all - std::min(all, state_.allocator.uncounted());
}

/// With mutex_ held.
void Compact::measure() {
    layout_ = Layout::measure(state_, has_packs_ ? live_goal_ + taken_out_of_live() : live(), cluster_count(leaked_),
                              empty_tables_.size());
    if (state_.snapshots.any())
        layout_.pending += snapshot_work_.pending;
    gauges_.ideal_end = static_cast<std::int64_t>(state_.geometry.bytes(layout_.end.value));
    gauges_.pending = static_cast<std::int64_t>(layout_.pending);
}

/// Bytes that may be moved and still occupy their source: less than one percent of what the image will be.
std::uint64_t Compact::most_uncommitted(HostCluster end) const {
    return std::clamp(state_.geometry.bytes(end.value) / ideal_share, min_moved_bytes, max_moved_bytes);
}

Uncommitted::Share Compact::room_for(std::uint64_t bytes, const Wanted &want) {
    return uncommitted_.take(bytes, most_uncommitted(want.end));
}

Compact::Wanted Compact::wanted(const StopCheck &stop) {
    prepare(stop);
    const Lock guard(mutex_);
    return wanted_now();
}

/// With mutex_ held.
Compact::Wanted Compact::wanted_now() const { return {layout_.end, std::min(site_end_, layout_.end), emptied_}; }

// --- the plan -----------------------------------------------------------------------------------------------------

/// An L2 table beyond the end moves with the first cluster it maps: whether that is among `mappings`.
bool Compact::table_moves_with(GuestCluster c, const std::vector<Mapping> &mappings, GuestCluster first,
                               HostCluster end) {
    const Geometry &g = state_.geometry;
    if (!mappings[c - first].has_host() || g.cluster_of(state_.l1.table(g.l1_index(c))) < end)
        return false;
    const GuestCluster table_first{round_down(c.value, g.l2_entries())};
    std::vector<Mapping> before;
    for (GuestCluster at = table_first; at < c;) {
        const std::uint64_t n = std::min<std::uint64_t>(c - at, batch);
        if (at >= first) {
            for (; at < c; ++at)
                if (mappings[at - first].has_host())
                    return false;
            break;
        }
        before.resize(std::min<std::uint64_t>(n, first - at));
        state_.mapper.survey(at, before);
        for (const Mapping &m : before)
            if (m.has_host())
                return false;
        at += before.size();
    }
    return true;
}

std::vector<Maintenance::Planned> Compact::plan(GuestOffset at, std::uint64_t length, std::size_t most,
                                                const StopCheck &stop_check) {
    const Geometry &g = state_.geometry;
    prepare(stop_check);
    refresh(stop_check);
    const Wanted want = wanted(stop_check);
    const HostCluster ideal = want.end;
    std::vector<Planned> planned;
    std::vector<Mapping> mappings;
    const GuestOffset end = at + length;
    while (at < end && planned.size() <= most) {
        require_going(stop_check);
        const GuestCluster first = g.cluster_of(at);
        GuestOffset stop = std::min(end, g.offset_of(state_.mapper.table_end(first)));
        if (!state_.mapper.has_table(first)) {
            append_planned(planned, at, stop - at, false);
            at = stop;
            continue;
        }
        stop = std::min(stop, g.offset_of(first + batch));
        mappings.resize((g.cluster_of(stop - 1) - first) + 1);
        state_.mapper.survey(first, mappings);
        bool asked_for_table = g.cluster_of(state_.l1.table(g.l1_index(first))) < ideal;
        bool empty = true;
        for (std::size_t i = 0; i < mappings.size(); ++i) {
            bool to_do = mappings[i].has_host() ? state_.mapper.is_in_image(mappings[i]) && mappings[i].host >= ideal
                                                : to_repack(mappings[i], want);
            empty = empty && state_.contents.is_nothing(first + i, mappings[i]);
            if (!asked_for_table && mappings[i].has_host()) {
                asked_for_table = true;
                to_do = to_do || table_moves_with(first + i, mappings, first, ideal);
            }
            const GuestOffset from = std::max(at, g.offset_of(first + i));
            append_planned(planned, from, std::min(stop, g.offset_of(first + i + 1)) - from, to_do);
        }
        if (empty && mappings.size() == state_.mapper.table_end(first) - first && first.value % g.l2_entries() == 0) {
            const Lock guard(mutex_);
            empty_tables_.insert(g.l1_index(first));
        }
        at = stop;
    }
    if (planned.size() > most)
        planned.resize(most);
    return planned;
}

} // namespace qlean
