// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "mapper.h"

#include "error.h"

#include <array>
#include <mutex>

namespace qlean {

namespace {

constexpr std::size_t batch = 64;

} // namespace

Mapping Mapper::judged(GuestCluster c, const L2Words &words) const {
    Mapping mapping = entry::decode(words, format_);
    if (format_.external_data) {
        if (mapping.has_host() ? mapping.host.value != c.value : mapping.kind == Mapping::Kind::compressed)
            mapping.kind = Mapping::Kind::damaged;
        mapping.copied = mapping.has_host();
        return mapping;
    }
    if (mapping.has_host() && mapping.host.value >= allocator_.end())
        mapping.kind = Mapping::Kind::damaged;
    if (mapping.kind == Mapping::Kind::compressed) {
        const auto extent = entry::compressed_extent(mapping.bits, geometry_.cluster_bits());
        if (geometry_.cluster_of(extent.at + (extent.bytes - 1)).value >= allocator_.end())
            mapping.kind = Mapping::Kind::damaged;
    }
    return mapping;
}

void Mapper::append_references(std::vector<HostRun> &runs, const Mapping &mapping) const {
    if (format_.external_data)
        return;
    if (mapping.has_host()) {
        append_run(runs, {mapping.host, 1});
    } else if (mapping.kind == Mapping::Kind::compressed) {
        const auto extent = entry::compressed_extent(mapping.bits, geometry_.cluster_bits());
        const HostCluster first = geometry_.cluster_of(extent.at);
        append_run(runs, {first, (geometry_.cluster_of(extent.at + (extent.bytes - 1)) - first) + 1});
    }
}

void Mapper::require_sane(GuestCluster c, const Mapping &mapping) const {
    if (mapping.kind == Mapping::Kind::damaged)
        throw_bad_image("'{}' is damaged: the L2 entry of guest offset {:#x} points to no valid cluster, or to the "
                        "image's own metadata; stop the server and run 'qlean check'",
                        file_.name(), geometry_.offset_of(c).value);
}

void Mapper::resolve(GuestCluster first, std::span<Mapping> out) {
    std::array<L2Words, batch> words;
    for (std::size_t done = 0; done < out.size();) {
        const auto n = std::min(batch, out.size() - done);
        l2_.read(first + done, std::span(words).first(n));
        for (std::size_t i = 0; i < n; ++i) {
            out[done + i] = guarded(first + done + i, words[i]);
            require_sane(first + done + i, out[done + i]);
        }
        done += n;
    }
}

void Mapper::resolve_to_change(GuestCluster first, std::span<Mapping> out) {
    resolve(first, out);
    for (Mapping &mapping : out)
        mapping = to_change(mapping);
}

Mapping Mapper::look(GuestCluster c) {
    L2Words words;
    l2_.read(c, std::span(&words, 1));
    return judged(c, words);
}

void Mapper::survey(GuestCluster first, std::span<Mapping> out) {
    std::vector<L2Words> words(out.size());
    l2_.read_around(first, words);
    for (std::size_t i = 0; i < words.size(); ++i)
        out[i] = judged(first + i, words[i]);
}

void Mapper::survey(const Snapshot &snapshot, GuestCluster first, std::span<Mapping> out) {
    const std::uint64_t step = geometry_.entry_words();
    std::vector<std::uint64_t> words(out.size() * step);
    snapshots_.read(snapshot, first, words);
    for (std::size_t i = 0; i < out.size(); ++i)
        out[i] = judged(first + i, {words[i * step], step == 2 ? words[i * step + 1] : 0});
}

bool Mapper::ensure_table(GuestCluster c, Allocator::Growth growth, Missing missing) {
    const std::uint64_t i = geometry_.l1_index(c);
    const auto nothing_to_do = [&] {
        const std::uint64_t word = l1_.word(i);
        return word == 0 ? missing == Missing::leave : !is_shared(word);
    };
    if (nothing_to_do())
        return true;
    const std::lock_guard guard(l1_.lock(i));
    if (nothing_to_do())
        return true;
    auto home = allocator_.reserve(1, growth);
    if (home.empty())
        return false;
    // A commit must not run out of space: without it nothing could ever be given back.
    const HostOffset at = geometry_.offset_of(home.extents().front().run.first);
    file_.reserve_space(at, geometry_.cluster_size());
    if (const HostOffset shared = l1_.table(i); shared.value != 0) {
        // Whole before it is linked. What its entries refer to keeps its count: that of the old table's path to it.
        const auto words = l2_.whole_table(i);
        file_.write(std::as_bytes(std::span(words)), at);
        l1_.relink(i, at);
        home.publish();
        allocator_.retire({{geometry_.cluster_of(shared), 1}});
        return true;
    }
    l1_.link_new(i, at);
    home.publish();
    return true;
}

Mapper::Editor::Editor(Mapper &mapper, GuestCluster first, std::uint64_t count)
    : mapper_(mapper), l1_guard_(mapper.l1_.lock(mapper.geometry_.l1_index(first))),
      first_slice_(mapper.l2_.slice_of(first)) {
    if (!mapper.has_table(first))
        return;
    const std::uint64_t last_slice = mapper.l2_.slice_of(first + (count - 1));
    pins_.reserve(last_slice - first_slice_ + 1);
    for (std::uint64_t s = first_slice_; s <= last_slice; ++s)
        pins_.push_back(mapper.l2_.pin(s));
}

Mapping Mapper::Editor::get(GuestCluster c) const {
    const Mapping mapping = peek(c);
    mapper_.require_sane(c, mapping);
    return mapping;
}

void Mapper::Editor::set_words(GuestCluster c, const L2Words &words) {
    L2Cache::Pin &at = pins_[mapper_.l2_.slice_of(c) - first_slice_];
    if ((at.load(c).entry | words.entry) & entry::compressed)
        mapper_.compressed_.forget(c); // every change passes here, so nothing that is out of date is kept
    at.store(c, words);
}

void Mapper::Editor::set_data(GuestCluster c, HostCluster host) {
    set_words(c,
              {entry::data(mapper_.geometry_.offset_of(host)), mapper_.format_.subclusters ? entry::all_allocated : 0});
}

void Mapper::Editor::set_zero(GuestCluster c) {
    set_words(c, mapper_.format_.subclusters ? L2Words{0, entry::all_zero} : L2Words{entry::zero, 0});
}

} // namespace qlean
