// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Reading compressed clusters, each decompressed once for reads that follow each other: a few stay in memory.
//
// A cluster in memory is known by its guest cluster and its descriptor. The bytes of an extent never change
// while an entry refers to it, so what is here is right as long as the entry is: whoever changes the entry of a guest
// cluster holds it exclusively and calls forget() before letting go, and whoever reads holds it shared. So nothing
// survives here that the file has retired, whatever becomes of those host bytes.
#pragma once

#include "address.h"
#include "compression.h"
#include "file.h"
#include "thread_safety.h"

#include <atomic>
#include <list>
#include <memory>
#include <span>
#include <unordered_map>

namespace qlean {

class CompressedClusters {
  public:
    /// `file` holds the extents: compressed clusters are never in an external data file, and never encrypted.
    CompressedClusters(const Geometry &geometry, Compression type, File &file)
        : geometry_(geometry), type_(type), file_(file) {}

    Compression type() const { return type_; }

    /// Guest cluster `c`, whose descriptor is `word`, from byte `within`. The caller holds `c` in the range lock.
    /// Throws Error (bad_image) if the extent cannot be decompressed.
    void read(GuestCluster c, std::uint64_t word, std::uint64_t within, std::span<std::byte> into);
    /// The entry of `c` changes: the caller holds `c` exclusively.
    void forget(GuestCluster c);

    /// Clusters decompressed so far, and bytes kept in memory.
    std::uint64_t decompressed() const { return decompressed_.load(std::memory_order_relaxed); }
    std::uint64_t memory_bytes() const;

  private:
    /// One decompressed cluster. Its mutex is held while it is being made, so that those who want it at the same time
    /// wait for the one who makes it.
    struct Kept {
        std::uint64_t word;
        Mutex mutex;
        std::unique_ptr<std::byte[]> bytes PROTECTED_BY(mutex); // set once
    };
    using Order = std::list<std::pair<GuestCluster, std::shared_ptr<Kept>>>; // most recently used first

    std::shared_ptr<Kept> find(GuestCluster c, std::uint64_t word, bool make);
    void decompress(GuestCluster c, std::uint64_t word, std::span<std::byte> cluster);

    Geometry geometry_;
    Compression type_;
    File &file_;
    mutable Mutex mutex_; // held for no I/O
    Order order_ PROTECTED_BY(mutex_);
    std::unordered_map<std::uint64_t, Order::iterator> by_cluster_ PROTECTED_BY(mutex_);
    std::atomic<std::uint64_t> kept_{0}; // as by_cluster_.size(), to pass by quickly where nothing is compressed
    std::atomic<std::uint64_t> decompressed_{0};
};

} // namespace qlean
