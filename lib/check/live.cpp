// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The check beside the guest. What was reserved when the watch began, or is taken or retired while it lives, cannot be
// judged and is not. All else was published before, and the commit below brought its refcount to the file; or was
// retired before, and the commit lowered it. So the tables say the same of it from then on, whether they are read from
// memory or from the file.
#include "../references.h"
#include "../surplus.h"
#include "check.h"
#include "checker.h"

#include <mutex>
#include <shared_mutex>

namespace qlean {

namespace {

class LiveSource final : public CheckSource {
  public:
    LiveSource(State &state, const Allocator::Watch &watch) : state_(state), watch_(watch) {
        // Between commits, for their leader may let the refcount table grow.
        state.write_back.lead([&] {
            header_ = state.header.header();
            table_ = state.refcounts.table_words(0, state.refcounts.table_entries());
        });
        for (std::uint64_t &word : table_)
            word = big_endian(word);
    }

    Header header() override { return header_; }
    File &file() override { return state_.file; }
    std::uint64_t length() override { return state_.geometry.bytes(state_.allocator.end()); }
    std::vector<std::uint64_t> l1() override {
        std::vector<std::uint64_t> words(state_.l1.size());
        for (std::uint64_t i = 0; i < words.size(); ++i)
            words[i] = state_.l1.word(i);
        return words;
    }
    std::vector<std::uint64_t> refcount_table() override { return table_; }
    void refcount_block(HostOffset at, std::span<std::byte> bytes) override {
        const std::shared_lock guard(state_.refcounts.home_lock());
        state_.file.read(bytes, at);
    }
    void l2(std::uint64_t i, HostOffset, std::span<std::uint64_t> words) override {
        const std::uint64_t step = state_.geometry.entry_words();
        entries_.resize(words.size() / step);
        state_.l2.read_around({i * state_.geometry.l2_entries()}, entries_);
        for (std::size_t n = 0; n < entries_.size(); ++n) {
            words[n * step] = entries_[n].entry;
            if (step == 2)
                words[n * step + 1] = entries_[n].bitmap;
        }
    }
    bool live() const override { return true; }
    L2Words l2_again(std::uint64_t i, std::uint64_t n) override {
        const Geometry &g = state_.geometry;
        const GuestCluster c{i * g.l2_entries() + n};
        L2Words words;
        std::optional<RangeLock::Shared> guard;
        if (c.value < g.guest_clusters())
            guard.emplace(state_.ranges, g.offset_of(c), 1);
        state_.l2.read_around(c, std::span(&words, 1));
        return words;
    }
    void all_read() override { state_.ranges.drain(); } // who unlinks retires within the same range
    bool touched(HostCluster c) override { return watch_.touched(c); }

  private:
    State &state_;
    const Allocator::Watch &watch_;
    Header header_;
    std::vector<std::uint64_t> table_;
    std::vector<L2Words> entries_;
};

} // namespace

CheckReport check_image(State &state, Repair how, const StopCheck &stop) {
    if (how == Repair::all)
        throw Error(Error::Kind::denied, EPERM,
                    fmt::format("'{}' is in use: only leaks are repaired beside a guest; stop the server for more",
                                state.file.name()));
    if (how != Repair::none)
        state.write_back.before_change();
    const std::shared_lock snapshots_stay(state.snapshots.lock());
    const Allocator::Watch watch(state.allocator);
    if (!state.read_only) {
        state.ranges.drain();
        state.write_back.commit(WriteBack::Give::back);
    }
    LiveSource source(state, watch);
    Checker checker(source, stop);
    checker.run();
    CheckReport &report = checker.report;
    // What an unknown extension owns looks leaked, and so does what a damaged entry should refer to.
    if (how == Repair::none || report.corruptions != 0 || report.check_errors != 0 ||
        state.header.header().has_unknown_extension())
        return report;
    std::vector<HostRun> once;
    Surplus more;
    for (const auto &[cluster, refcount] : checker.unreferenced())
        if (!watch.touched(cluster) && more.add(cluster, refcount - 1))
            append_run(once, {cluster, 1});
    state.allocator.retire(once);
    more.retire(state.allocator, [&] { state.write_back.commit(WriteBack::Give::back); });
    report.leaks_fixed = cluster_count(once);
    report.leaks -= report.leaks_fixed;
    return report;
}

} // namespace qlean
