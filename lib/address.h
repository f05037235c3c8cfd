// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The address spaces of an image, as types that do not mix: the guest's disk and the host's file, each in bytes
// (…Offset) and in clusters (…Cluster). Geometry is the only place that converts between them.
#pragma once

#include <algorithm>
#include <compare>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

namespace qlean {

template <class Space>
struct Address {
    std::uint64_t value = 0;

    friend constexpr auto operator<=>(Address, Address) = default;
    friend constexpr Address operator+(Address a, std::uint64_t n) { return Address{a.value + n}; }
    friend constexpr Address operator-(Address a, std::uint64_t n) { return Address{a.value - n}; }
    friend constexpr std::uint64_t operator-(Address a, Address b) { return a.value - b.value; }
    constexpr Address &operator+=(std::uint64_t n) {
        value += n;
        return *this;
    }
    constexpr Address &operator++() { return *this += 1; }
};

using GuestOffset = Address<struct GuestBytes>;     ///< byte of the guest's disk
using HostOffset = Address<struct HostBytes>;       ///< byte of the image file
using GuestCluster = Address<struct GuestClusters>; ///< cluster of the guest's disk
using HostCluster = Address<struct HostClusters>;   ///< cluster of the image file

constexpr unsigned host_offset_bits = 56; ///< no L1, L2 or refcount table entry can name more

/// Adjacent clusters of the image file.
struct HostRun {
    HostCluster first;
    std::uint64_t count = 0;

    HostCluster end() const { return first + count; }
    friend bool operator==(HostRun, HostRun) = default;
};

using VisitRun = std::function<void(HostRun)>;
/// Calls a visitor for each of some runs: for lists that an image could make too long for the memory.
using EachRun = std::function<void(const VisitRun &)>;

/// Part of it lies at or beyond `end`.
inline bool beyond(HostRun run, HostCluster end) { return run.count > 0 && run.end() > end; }
/// How many of its clusters do.
inline std::uint64_t clusters_beyond(HostRun run, HostCluster end) {
    return run.end() - std::min(run.end(), std::max(run.first, end));
}

/// Appends `run`, joining it to the last run where they touch.
inline void append_run(std::vector<HostRun> &runs, HostRun run) {
    if (!runs.empty() && runs.back().end() == run.first)
        runs.back().count += run.count;
    else if (run.count != 0)
        runs.push_back(run);
}

/// Sorts by address and joins neighbours.
inline void coalesce(std::vector<HostRun> &runs) {
    std::sort(runs.begin(), runs.end(), [](const HostRun &a, const HostRun &b) { return a.first < b.first; });
    std::vector<HostRun> joined;
    for (const HostRun &run : runs)
        append_run(joined, run);
    runs.swap(joined);
}

inline std::uint64_t cluster_count(const std::vector<HostRun> &runs) {
    std::uint64_t n = 0;
    for (const HostRun &run : runs)
        n += run.count;
    return n;
}

constexpr std::uint64_t divide_up(std::uint64_t n, std::uint64_t by) { return n / by + (n % by != 0); }
constexpr std::uint64_t round_down(std::uint64_t n, std::uint64_t to) { return n / to * to; }
constexpr std::uint64_t round_up(std::uint64_t n, std::uint64_t to) { return divide_up(n, to) * to; }

/// The sizes that follow from a header (docs/interop/qcow2, "Header" and "Cluster mapping"). Immutable.
class Geometry {
  public:
    Geometry(unsigned cluster_bits, unsigned refcount_order, std::uint64_t virtual_size, bool subclusters = false)
        : cluster_bits_(cluster_bits), refcount_order_(refcount_order), virtual_size_(virtual_size),
          subclusters_(subclusters) {}

    std::uint64_t cluster_size() const { return std::uint64_t{1} << cluster_bits_; }
    unsigned cluster_bits() const { return cluster_bits_; }
    std::uint64_t virtual_size() const { return virtual_size_; }

    /// Guest clusters of the disk; a partial last one counts as whole.
    std::uint64_t guest_clusters() const { return divide_up(virtual_size_, cluster_size()); }

    GuestCluster cluster_of(GuestOffset at) const { return {at.value >> cluster_bits_}; }
    HostCluster cluster_of(HostOffset at) const { return {at.value >> cluster_bits_}; }
    GuestOffset offset_of(GuestCluster c) const { return {c.value << cluster_bits_}; }
    HostOffset offset_of(HostCluster c) const { return {c.value << cluster_bits_}; }
    std::uint64_t within(GuestOffset at) const { return at.value & (cluster_size() - 1); }

    /// Bytes in `clusters` clusters, and clusters that hold `bytes`.
    std::uint64_t bytes(std::uint64_t clusters) const { return clusters << cluster_bits_; }
    std::uint64_t clusters_for(std::uint64_t bytes) const { return divide_up(bytes, cluster_size()); }

    /// Extended L2 entries: each cluster is 32 subclusters with states of their own.
    bool has_subclusters() const { return subclusters_; }
    std::uint64_t subcluster_size() const { return cluster_size() / 32; }
    /// 64-bit words of an L2 entry, and entries of an L2 table.
    std::uint64_t entry_words() const { return subclusters_ ? 2 : 1; }
    std::uint64_t l2_entries() const { return cluster_size() / (8 * entry_words()); }
    std::uint64_t l1_entries() const { return divide_up(guest_clusters(), l2_entries()); }
    std::uint64_t l1_index(GuestCluster c) const { return c.value / l2_entries(); }
    std::uint64_t l2_index(GuestCluster c) const { return c.value % l2_entries(); }

    unsigned refcount_order() const { return refcount_order_; }
    /// Clusters one refcount block describes.
    std::uint64_t refcounts_per_block() const { return (cluster_size() * 8) >> refcount_order_; }

  private:
    unsigned cluster_bits_;
    unsigned refcount_order_;
    std::uint64_t virtual_size_;
    bool subclusters_;
};

} // namespace qlean
