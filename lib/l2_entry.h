// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// One word of an L1 or L2 table and what it means (docs/interop/qcow2, "Cluster mapping"). Pure. Words here are in
// host byte order. Reserved bits that are set are reported as `Damaged`, never ignored.
#pragma once

#include "address.h"

#include <cstdint>

namespace qlean {

/// What an L2 entry says about a guest cluster.
struct Mapping {
    enum class Kind : std::uint8_t {
        unallocated,    ///< nothing here; reads as zeroes without a backing file
        zero,           ///< reads as zeroes, no host cluster
        zero_allocated, ///< reads as zeroes, but a host cluster is kept for it
        data,           ///< bytes are in `host`
        compressed,     ///< bytes are in a compressed extent
        damaged,        ///< not a valid entry
    };

    Kind kind = Kind::unallocated;
    /// The host cluster's refcount is exactly one: it may be written in place.
    bool copied = false;
    HostCluster host; ///< for data and zero_allocated

    bool has_host() const { return kind == Kind::data || kind == Kind::zero_allocated; }
    bool writable_in_place() const { return kind == Kind::data && copied; }
    bool reads_as_zeroes() const {
        return kind == Kind::unallocated || kind == Kind::zero || kind == Kind::zero_allocated;
    }
    friend bool operator==(const Mapping &, const Mapping &) = default;
};

namespace entry {

constexpr std::uint64_t copied = std::uint64_t{1} << 63;
constexpr std::uint64_t compressed = std::uint64_t{1} << 62;
constexpr std::uint64_t zero = 1;
constexpr std::uint64_t offset_mask = 0x00ff'ffff'ffff'fe00;

/// Decodes an L2 entry of an image of `version`.
inline Mapping decode(std::uint64_t word, unsigned cluster_bits, unsigned version) {
    Mapping m;
    if (word == 0)
        return m;
    if (word & compressed) {
        m.kind = Mapping::Kind::compressed;
        return m;
    }
    const std::uint64_t offset = word & offset_mask;
    const std::uint64_t reserved = word & ~(copied | zero | offset_mask);
    const std::uint64_t misaligned = offset & ((std::uint64_t{1} << cluster_bits) - 1);
    const bool is_zero = word & zero;
    if (reserved != 0 || misaligned != 0 || (is_zero && version < 3)) {
        m.kind = Mapping::Kind::damaged;
        return m;
    }
    m.copied = word & copied;
    m.host = HostCluster{offset >> cluster_bits};
    if (offset == 0)
        m.kind = is_zero ? Mapping::Kind::zero : (m.copied ? Mapping::Kind::damaged : Mapping::Kind::unallocated);
    else
        m.kind = is_zero ? Mapping::Kind::zero_allocated : Mapping::Kind::data;
    return m;
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
