// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The 32 subclusters of a cluster (docs/interop/qcow2, "Extended L2 Entries"): the bitmap word beside an L2 entry, and
// which subclusters a range of bytes concerns. Pure.
//
// Invariant of a valid bitmap: no subcluster is both data and zero. What the entry beside it may demand of it is the
// mapping's business (l2_entry.h).
#pragma once

#include "address.h"

#include <bit>

namespace qlean::subclusters {

constexpr unsigned count = 32;

/// A set of subclusters of one cluster: bit i for subcluster i.
using Set = std::uint32_t;
constexpr Set all = ~Set{0};

/// Subclusters [first, end).
constexpr Set range(unsigned first, unsigned end) {
    return static_cast<Set>((std::uint64_t{1} << end) - (std::uint64_t{1} << first));
}

enum class Kind : std::uint8_t {
    unallocated, ///< what lies below the image shows through; zeroes if nothing does
    zero,        ///< reads as zeroes
    data,        ///< its bytes are in the host cluster
};

/// The second word of an extended L2 entry, in host byte order.
class Bitmap {
  public:
    constexpr Bitmap() = default;
    explicit constexpr Bitmap(std::uint64_t word) : word_(word) {}

    constexpr std::uint64_t word() const { return word_; }
    constexpr Set data() const { return static_cast<Set>(word_); }
    constexpr Set zero() const { return static_cast<Set>(word_ >> 32); }
    constexpr Set unallocated() const { return ~(data() | zero()); }
    constexpr bool valid() const { return (data() & zero()) == 0; }

    constexpr Kind operator[](unsigned i) const {
        return data() >> i & 1 ? Kind::data : zero() >> i & 1 ? Kind::zero : Kind::unallocated;
    }
    constexpr Set of(Kind kind) const {
        return kind == Kind::data ? data() : kind == Kind::zero ? zero() : unallocated();
    }
    /// The same, but for `set`, which becomes `kind`.
    constexpr Bitmap with(Set set, Kind kind) const {
        const Set data_bits = (data() & ~set) | (kind == Kind::data ? set : 0);
        const Set zero_bits = (zero() & ~set) | (kind == Kind::zero ? set : 0);
        return Bitmap(std::uint64_t{zero_bits} << 32 | data_bits);
    }

    friend constexpr bool operator==(Bitmap, Bitmap) = default;

  private:
    std::uint64_t word_ = 0;
};

constexpr Bitmap all_data{std::uint64_t{all}};
constexpr Bitmap all_zero{std::uint64_t{all} << 32};

/// A range of bytes of a cluster.
struct Piece {
    std::uint64_t within = 0, length = 0;
};

/// How bytes of a cluster fall into subclusters. Ranges are [within, within + length) inside one cluster.
class Grid {
  public:
    explicit Grid(const Geometry &geometry) : bits_(geometry.cluster_bits() - 5) {}

    std::uint64_t size() const { return std::uint64_t{1} << bits_; }
    std::uint64_t bytes(unsigned n) const { return std::uint64_t{n} << bits_; }

    /// From the first byte of the first member to the last of the last.
    Piece span(Set set) const {
        if (set == 0)
            return {};
        const auto first = static_cast<unsigned>(std::countr_zero(set));
        const unsigned end = count - static_cast<unsigned>(std::countl_zero(set));
        return {bytes(first), bytes(end - first)};
    }
    /// Subclusters with at least one byte in the range.
    Set touched(std::uint64_t within, std::uint64_t length) const {
        return length == 0 ? 0 : range(index(within), index(within + length - 1) + 1);
    }
    /// Subclusters with all their bytes in the range.
    Set covered(std::uint64_t within, std::uint64_t length) const {
        const unsigned first = index(within + size() - 1), end = index(within + length);
        return first < end ? range(first, end) : 0;
    }

    /// Calls f(kind, within, length) for the pieces of a range, each as long as the kind stays the same.
    template <class F>
    void each_run(Bitmap bitmap, std::uint64_t within, std::uint64_t length, F &&f) const {
        const std::uint64_t stop = within + length;
        while (within < stop) {
            const unsigned first = index(within);
            const Kind kind = bitmap[first];
            const std::uint64_t end = std::min(stop, bytes(run_end(bitmap.of(kind), first)));
            f(kind, within, end - within);
            within = end;
        }
    }
    /// Calls f(within, length) for the bytes of each run of adjacent members of `set`.
    template <class F>
    void each_run(Set set, F &&f) const {
        while (set != 0) {
            const auto first = static_cast<unsigned>(std::countr_zero(set));
            const unsigned end = run_end(set, first);
            f(bytes(first), bytes(end - first));
            set &= ~range(first, end);
        }
    }

    /// One past the last of the adjacent members of `set` that begin with `first`, which is one.
    static unsigned run_end(Set set, unsigned first) {
        return first + static_cast<unsigned>(std::countr_one(set >> first));
    }

  private:
    unsigned index(std::uint64_t within) const { return static_cast<unsigned>(within >> bits_); }

    unsigned bits_;
};

/// What the host can be given back after [within, within + length) was given up and only `occupied` still holds data:
/// the whole blocks of the host inside the range, and those it shares with neighbours that hold nothing either.
inline Piece returnable(const Grid &grid, Set occupied, std::uint64_t within, std::uint64_t length,
                        std::uint64_t block) {
    const std::uint64_t end = within + length;
    std::uint64_t from = round_up(within, block), to = round_down(end, block);
    if (const Set gone = grid.covered(within, length) & ~occupied) {
        const auto first = static_cast<unsigned>(std::countr_zero(gone));
        // Without the members below `first`, the highest one left of it is where the free run begins.
        const auto begin = count - static_cast<unsigned>(std::countl_zero(occupied & range(0, first)));
        const unsigned stop = Grid::run_end(~occupied, first);
        from = std::min(from, std::max(round_up(grid.bytes(begin), block), round_down(within, block)));
        to = std::max(to, std::min(round_down(grid.bytes(stop), block), round_up(end, block)));
    }
    return from < to ? Piece{from, to - from} : Piece{};
}

} // namespace qlean::subclusters
