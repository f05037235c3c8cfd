// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// From guest clusters to what the L2 tables say of them, and back: resolving, linking, changing.
//
// resolve() wants the clusters held in the range lock (shared is enough); an Editor wants them exclusively. An Editor
// works within one L2 table, whose L1 lock it holds shared; no data I/O while one lives.
//
// An entry holds one reference on each host cluster it uses: append_references() names them, and whoever replaces the
// entry retires them.
#pragma once

#include "allocator.h"
#include "compressed_clusters.h"
#include "l1_table.h"
#include "l2_cache.h"
#include "l2_entry.h"
#include "snapshots.h"

#include <shared_mutex>
#include <span>

namespace qlean {

class Mapper {
  public:
    Mapper(const Geometry &geometry, const EntryFormat &format, File &file, L1Table &l1, L2Cache &l2,
           Snapshots &snapshots, Allocator &allocator, CompressedClusters &compressed, Refcounts &refcounts,
           const MetadataGuard &guard, const Claims &claims)
        : geometry_(geometry), format_(format), file_(file), l1_(l1), l2_(l2), snapshots_(snapshots),
          allocator_(allocator), compressed_(compressed), refcounts_(refcounts), guard_(guard), claims_(claims) {}

    const EntryFormat &format() const { return format_; }

    /// What guest clusters [first, first + out.size()) map to. Throws Error (bad_image) for an entry that cannot be.
    void resolve(GuestCluster first, std::span<Mapping> out);
    /// The same for who may change clusters in place: `copied` holds only where the refcount does not say otherwise.
    void resolve_to_change(GuestCluster first, std::span<Mapping> out);
    /// What `c` maps to at this moment, for who does not hold its range: brings the slice into memory for who will.
    /// What seems damaged may only be out of date, so it is taken as it is.
    Mapping look(GuestCluster c);
    /// As look, passing by the cache: for plans and walks.
    void survey(GuestCluster first, std::span<Mapping> out);

    /// The same for a snapshot.
    void survey(const Snapshot &snapshot, GuestCluster first, std::span<Mapping> out);

    enum class Missing { create, leave };
    /// To be called before entries of the table that maps `c` change for the guest: the table exists after this (unless
    /// it may be missing), and is the active image's alone. False: commit first, then ask again.
    bool ensure_table(GuestCluster c, Allocator::Growth growth, Missing missing = Missing::create);
    /// `mapping`, not `copied` if its cluster is counted more than once.
    Mapping to_change(Mapping mapping) const {
        if (mapping.copied && mapping.has_host() && !format_.external_data && refcounts_.was_shared(mapping.host))
            mapping.copied = false;
        return mapping;
    }
    /// The entry lets the guest write into the image's own metadata, or into what another entry claims too.
    bool claims_metadata(const Mapping &mapping) const {
        return mapping.copied && mapping.has_host() && guard_.has(mapping.host) && !format_.external_data;
    }
    /// The host clusters on which an entry holds a reference, one each.
    void append_references(std::vector<HostRun> &runs, const Mapping &mapping) const;
    /// The host cluster of an entry, if it is one of the data file: nothing counts it, and it never moves.
    bool is_external(const Mapping &mapping) const { return format_.external_data && mapping.has_host(); }
    void append_external(std::vector<HostRun> &runs, const Mapping &mapping) const {
        if (is_external(mapping))
            append_run(runs, {mapping.host, 1});
    }
    /// The entry's host cluster is one of the image file, and may have to move.
    bool is_in_image(const Mapping &mapping) const { return mapping.has_host() && !format_.external_data; }
    bool has_table(GuestCluster c) const { return l1_.table(geometry_.l1_index(c)).value != 0; }
    /// One past the last guest cluster that the table of `c` maps.
    GuestCluster table_end(GuestCluster c) const {
        return {std::min((geometry_.l1_index(c) + 1) * geometry_.l2_entries(), geometry_.guest_clusters())};
    }

    class [[nodiscard]] Editor {
      public:
        /// For clusters [first, first + count) of one table. Loads what it needs; the rest cannot fail.
        Editor(Mapper &mapper, GuestCluster first, std::uint64_t count);
        /// There is a table; without one everything is unallocated and nothing may be set.
        bool exists() const { return !pins_.empty(); }
        Mapping get(GuestCluster c) const;
        /// As get, taking an entry that cannot be used as it is instead of throwing.
        Mapping peek(GuestCluster c) const { return exists() ? mapper_.guarded(c, pin(c).load(c)) : Mapping{}; }
        L2Words words(GuestCluster c) const { return pin(c).load(c); }
        void set_words(GuestCluster c, const L2Words &words);
        /// The whole cluster is data in `host`, which belongs to this entry alone.
        void set_data(GuestCluster c, HostCluster host);
        void set_unallocated(GuestCluster c) { set_words(c, {}); }
        /// Reads as zeroes, whatever lies below. Not in version 2.
        void set_zero(GuestCluster c);

      private:
        const L2Cache::Pin &pin(GuestCluster c) const { return pins_[mapper_.l2_.slice_of(c) - first_slice_]; }

        Mapper &mapper_;
        std::shared_lock<RwLock> l1_guard_;
        std::uint64_t first_slice_;
        std::vector<L2Cache::Pin> pins_;
    };

    /// Decoded; damaged if it points beyond the file, or, into a data file, elsewhere than to the guest's offset.
    Mapping judged(GuestCluster c, const L2Words &words) const;

  private:
    /// The same; damaged too if it claims the image's own metadata. Not for walks beside the guest: they may see an
    /// entry that is out of date, and whose cluster is a table by now.
    Mapping guarded(GuestCluster c, const L2Words &words) const {
        Mapping mapping = judged(c, words);
        if (claims_metadata(mapping)) {
            mapping.copied = false;
            if (!claims_.twice(mapping.host))
                mapping.kind = Mapping::Kind::damaged;
        }
        return mapping;
    }
    /// A snapshot may have this table too. Without snapshots it is ours even where a crash left its flag clear.
    bool is_shared(std::uint64_t l1_word) const {
        return l1_word != 0 && (l1_word & entry::copied) == 0 && snapshots_.any();
    }
    void require_sane(GuestCluster c, const Mapping &mapping) const;

    Geometry geometry_;
    EntryFormat format_;
    File &file_;
    L1Table &l1_;
    L2Cache &l2_;
    Snapshots &snapshots_;
    Allocator &allocator_;
    CompressedClusters &compressed_;
    Refcounts &refcounts_;
    const MetadataGuard &guard_;
    const Claims &claims_;
};

} // namespace qlean
