// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The parts of one open image, built in the order in which they rely on each other. What the services (image,
// compaction) share; it has no behaviour of its own.
#pragma once

#include "allocator.h"
#include "backing.h"
#include "bitmaps.h"
#include "claims.h"
#include "compressed_clusters.h"
#include "contents.h"
#include "file.h"
#include "header_home.h"
#include "l1_table.h"
#include "l2_cache.h"
#include "mapper.h"
#include "metadata_guard.h"
#include "range_lock.h"
#include "refcounts.h"
#include "snapshots.h"
#include "write_back.h"

#include <memory>
#include <optional>

namespace qlean {

/// What opening found: all that the parts of an image are made from. They are made once more when the disk is resized:
/// what is added here is given again there (made_from in image_resize.cpp).
struct Opened {
    std::shared_ptr<File> file;       // shared, so that the parts can be made anew when the disk is resized
    std::shared_ptr<File> data;       ///< null: the guest's data is in `file`
    std::shared_ptr<Backing> backing; ///< may be null
    Header header;
    HostRun encryption_header; ///< empty: not encrypted
    std::vector<std::byte> header_sector;
    std::vector<std::uint64_t> l1_words, refcount_table; ///< as read, big-endian
    Snapshots::Loaded snapshots;
    std::uint64_t end; ///< clusters of the file
    bool read_only;
    std::uint64_t cache_bytes;
    std::optional<BitmapDirectory> bitmaps = {};    ///< those that count
    std::optional<std::uint64_t> virtual_size = {}; ///< of the disk, if not what the header says (yet)
};

struct State {
    /// Reads nothing of the file.
    explicit State(Opened opened);

    const std::shared_ptr<File> file_owner, data_owner;
    const std::shared_ptr<Backing> backing;
    File &file;                      ///< metadata
    File &data;                      ///< the guest's data: the same file, unless it has one of its own
    const HostRun encryption_header; ///< stays where it is; empty: not encrypted
    const bool raw_data;             ///< `data` is the guest's disk, byte for byte, and stays so
    const Geometry geometry;
    const bool read_only;
    SyncLog syncs;
    HeaderHome header;
    MetadataGuard guard;
    Claims claims;
    L1Table l1;
    Snapshots snapshots;
    L2Cache l2;
    Refcounts refcounts;
    Allocator allocator;
    WriteBack write_back;
    RangeLock ranges;
    CompressedClusters compressed;
    Mapper mapper;
    Contents contents;
    const std::unique_ptr<Bitmaps> bitmaps; ///< null: the image has none that count
    const std::uint64_t cache_bytes;
    const std::uint64_t opened_end; ///< clusters of the file when it was opened

    /// Header, L1, refcount table and blocks, L2 tables, those of snapshots: in use, whatever their refcounts say.
    /// Bitmaps are not among them.
    void each_metadata_run(const VisitRun &visit) const;
    /// These, and what the bitmaps have.
    void each_used_run(const VisitRun &visit) const;

  private:
    void require_counted(HostRun run) const;
};

} // namespace qlean
