// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The check: everything that refers to host clusters is counted, exactly, and compared with the refcounts and with the
// flags that say "refcount one". What counts as what follows QEMU (docs/interop/qcow2; block/qcow2-refcount.c), so
// that both give the same numbers.
//
// Tables are read once however many L1 entries (of the disk or its snapshots) point to them, so time is bounded by the
// size of the file, and memory by a byte and a bit for each of its clusters, whatever a damaged image claims.
#pragma once

#include "../stop.h"
#include "reference_tally.h"
#include "report.h"
#include "source.h"

#include <memory>
#include <optional>

namespace qlean {

class Checker {
  public:
    Checker(CheckSource &source, const StopCheck &stop);

    /// Once. Throws Error if the image cannot be read, or `stop` says so.
    void run();

    CheckReport report;

    // What a repair needs, after run().

    /// An L2 table: where, how many L1 entries of the active image and of all point to it, and one of the former.
    struct Table {
        HostOffset at;
        std::uint64_t active, total;
        std::uint64_t index;
    };
    const std::vector<Table> &tables() const { return tables_; }
    const std::vector<std::uint64_t> &refcount_table() const { return table_; }
    /// However many a refcount can say.
    std::uint64_t exact_references(std::uint64_t cluster) const { return tally_->exact(cluster); }
    /// One past the furthest cluster beyond the end of the file that something refers to, unless absurdly far; else 0.
    std::uint64_t reach() const { return reach_; }
    /// Clusters that were compared.
    std::uint64_t clusters() const { return clusters_; }
    /// The counts of a region as they are stored; nothing where they cannot be.
    std::optional<std::vector<std::byte>> block(std::uint64_t region);
    /// As stored. Exact only where it matters: 1, or something else. Nothing where it cannot be read.
    std::optional<std::uint64_t> refcount(HostCluster c);
    /// Every reference was found: only then may anything be changed.
    bool complete() const { return complete_; }
    /// The refcount structures cannot be mended where they are.
    bool needs_rebuild() const { return rebuild_; }
    struct Leak {
        HostCluster cluster;
        std::uint64_t refcount;
    };
    /// Clusters with a refcount that nothing refers to.
    const std::vector<Leak> &unreferenced() const { return unreferenced_; }

  private:
    enum class Type { unallocated, zero, zero_allocated, normal, compressed };

    std::uint64_t references(std::uint64_t cluster) const { return tally_->of(cluster); }
    void corrupt(std::string text, std::uint64_t times = 1);
    void give_up(std::string text);
    void count(HostOffset at, std::uint64_t bytes, const char *what, std::uint64_t times = 1);
    void load_refcounts();
    void add_tables(const std::vector<std::uint64_t> &l1, std::uint64_t times, bool active);
    void join_tables();
    void count_snapshots();
    void count_bitmaps();
    std::uint64_t count_bitmap_table(HostOffset at, std::uint64_t entries);
    void count_table(const Table &table);
    Type type_of(std::uint64_t word) const;
    void count_entry(const Table &table, std::uint64_t n, L2Words words, std::uint64_t &expected);
    bool seems_wrong(const L2Words &words);
    bool flag_is_wrong(std::uint64_t word, HostCluster c);
    void count_refcount_blocks();
    void check_l1_flags();
    void compare();

    CheckSource &source_;
    const StopCheck &stop_;
    const Header header_;
    const Geometry geometry_;
    const std::uint64_t cluster_;
    std::uint64_t clusters_; ///< of the file; one more if a reference reaches beyond a partial last one
    std::uint64_t reach_ = 0;
    std::vector<std::uint64_t> table_, l1_;
    std::vector<Table> tables_;
    std::size_t joined_ = 0;
    std::vector<std::uint64_t> words_;
    std::unique_ptr<ReferenceTally> tally_;
    std::unique_ptr<LazyBytes> ones_; ///< a bit per cluster: its refcount is one
    std::vector<Leak> unreferenced_;
    bool rebuild_ = false, complete_ = true;
};

} // namespace qlean
