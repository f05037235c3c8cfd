// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// One entry of an L1 or L2 table and what it means (docs/interop/qcow2, "Cluster mapping"). Pure. Words here are in
// host byte order. Reserved bits that are set are reported as `damaged`, never ignored.
#pragma once

#include "address.h"

#include <array>
#include <cstdint>
#include <span>
#include <vector>

namespace qlean {

/// An L2 entry as a table holds it. `bitmap` belongs to extended L2 entries; without them it is 0.
struct L2Words {
    std::uint64_t entry, bitmap; // not initialised: arrays of these are filled on the way of every request

    friend bool operator==(const L2Words &, const L2Words &) = default;
};

/// What of the header decides how an L2 entry is read.
struct EntryFormat {
    unsigned cluster_bits;
    unsigned version;
    bool subclusters = false;   ///< extended L2 entries
    bool external_data = false; ///< the guest's data has a file of its own, in which offset 0 is a place like others
};

/// What an L2 entry says about a guest cluster.
struct Mapping {
    enum class Kind : std::uint8_t {
        unallocated,     ///< nothing here; reads as what lies below, or as zeroes
        zero,            ///< reads as zeroes, no host cluster
        zero_allocated,  ///< reads as zeroes, but a host cluster is kept for it
        data,            ///< bytes are in `host`
        compressed,      ///< bytes are in a compressed extent: `bits` is its descriptor
        mixed,           ///< the subclusters differ, no host cluster: `bits` is their bitmap
        mixed_allocated, ///< the subclusters differ, those with data are in `host`: `bits` is their bitmap
        damaged,         ///< not a valid entry
    };

    Kind kind = Kind::unallocated;
    /// The host cluster's refcount is exactly one: it may be written in place.
    bool copied = false;
    HostCluster host; ///< where has_host()
    std::uint64_t bits = 0;

    bool has_host() const {
        return kind == Kind::data || kind == Kind::zero_allocated || kind == Kind::mixed_allocated;
    }
    bool is_mixed() const { return kind == Kind::mixed || kind == Kind::mixed_allocated; }
    /// The host cluster belongs to this entry alone.
    bool owned() const { return copied && has_host(); }
    bool writable_in_place() const { return kind == Kind::data && copied; }
    bool is_zero() const { return kind == Kind::zero || kind == Kind::zero_allocated; }
    friend bool operator==(const Mapping &, const Mapping &) = default;
};

/// Those of consecutive clusters, without memory from the heap for few, as a small request has.
class Mappings {
  public:
    explicit Mappings(std::size_t count) : count_(count) {
        if (count > few_.size())
            many_.resize(count);
    }
    std::span<Mapping> all() { return count_ > few_.size() ? std::span(many_) : std::span(few_).first(count_); }

  private:
    std::size_t count_;
    std::array<Mapping, 4> few_;
    std::vector<Mapping> many_;
};

/// Where the bytes of a compressed cluster are. They end somewhere in the last of whole 512-byte sectors; each host
/// cluster that these touch has one reference from the entry.
struct CompressedExtent {
    HostOffset at;
    std::uint64_t bytes; ///< up to the end of the last sector
};

namespace entry {

constexpr std::uint64_t copied = std::uint64_t{1} << 63;
constexpr std::uint64_t compressed = std::uint64_t{1} << 62;
constexpr std::uint64_t zero = 1;
constexpr std::uint64_t offset_mask = 0x00ff'ffff'ffff'fe00;
/// All subclusters have data.
constexpr std::uint64_t all_allocated = 0xffff'ffff;
/// All subclusters read as zeroes.
constexpr std::uint64_t all_zero = all_allocated << 32;

inline CompressedExtent compressed_extent(std::uint64_t descriptor, unsigned cluster_bits) {
    const unsigned offset_bits = 62 - (cluster_bits - 8);
    const std::uint64_t at = descriptor & ((std::uint64_t{1} << offset_bits) - 1);
    const std::uint64_t more_sectors = (descriptor & (compressed - 1)) >> offset_bits;
    return {{at}, (more_sectors + 1) * 512 - at % 512};
}

/// Decodes an L2 entry.
inline Mapping decode(const L2Words &words, const EntryFormat &format) {
    using Kind = Mapping::Kind;
    const std::uint64_t word = words.entry;
    Mapping m;
    if (word == 0 && words.bitmap == 0)
        return m;
    if (word & compressed) {
        m.kind = words.bitmap == 0 ? Kind::compressed : Kind::damaged;
        m.bits = word & ~(copied | compressed);
        return m;
    }
    const std::uint64_t offset = word & offset_mask;
    const bool is_zero = !format.subclusters && (word & zero);
    const std::uint64_t reserved = word & ~(copied | offset_mask | (format.subclusters ? 0 : zero));
    const std::uint64_t misaligned = offset & ((std::uint64_t{1} << format.cluster_bits) - 1);
    if (reserved != 0 || misaligned != 0 || (is_zero && format.version < 3)) {
        m.kind = Kind::damaged;
        return m;
    }
    m.copied = word & copied;
    m.host = HostCluster{offset >> format.cluster_bits};
    const bool hosted = offset != 0 || (format.external_data && m.copied);
    if (!hosted && m.copied && !is_zero) {
        m.kind = Kind::damaged;
        return m;
    }
    if (!format.subclusters) {
        if (hosted)
            m.kind = is_zero ? Kind::zero_allocated : Kind::data;
        else
            m.kind = is_zero ? Kind::zero : Kind::unallocated;
        return m;
    }
    const std::uint64_t data = words.bitmap & all_allocated, zeroes = words.bitmap >> 32;
    m.bits = words.bitmap;
    if ((data & zeroes) != 0 || (!hosted && data != 0))
        m.kind = Kind::damaged;
    else if (data == all_allocated)
        m.kind = Kind::data;
    else if (zeroes == all_allocated)
        m.kind = hosted ? Kind::zero_allocated : Kind::zero;
    else if (hosted)
        m.kind = Kind::mixed_allocated;
    else
        m.kind = words.bitmap == 0 ? Kind::unallocated : Kind::mixed;
    return m;
}

/// Decodes an L2 entry of a plain image of `version`.
inline Mapping decode(std::uint64_t word, unsigned cluster_bits, unsigned version) {
    return decode({word, 0}, {cluster_bits, version});
}

/// The L2 entry of a cluster that belongs to one guest cluster alone.
inline std::uint64_t data(HostOffset at) { return at.value | copied; }

/// The table an L1 entry points to; 0 for none.
inline HostOffset table(std::uint64_t l1_word) { return {l1_word & offset_mask}; }

/// An L1 entry's reserved bits are clear and its table is cluster-aligned.
inline bool valid_l1(std::uint64_t word, unsigned cluster_bits) {
    return (word & ~(copied | offset_mask)) == 0 &&
           ((word & offset_mask) & ((std::uint64_t{1} << cluster_bits) - 1)) == 0 &&
           ((word & offset_mask) != 0 || word == 0);
}

} // namespace entry

} // namespace qlean
