// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// One open connection to one export. The base class passes everything through to the plugin; each export that the
// filter has to do with overrides what it changes. The object is the connection's handle in nbdkit, and the plugin
// below is always open, so `next` is valid in every call.

#pragma once

#include <cstdint>

#include <nbdkit-filter.h>

namespace qlean {

class Export {
  public:
    virtual ~Export() = default;

    /// Called once, after open and before anything else.
    virtual int prepare(nbdkit_next *) { return 0; }

    virtual std::int64_t get_size(nbdkit_next *next) { return next->get_size(next); }
    virtual const char *description(nbdkit_next *next) { return next->export_description(next); }
    virtual int block_size(nbdkit_next *next, std::uint32_t *minimum, std::uint32_t *preferred,
                           std::uint32_t *maximum) {
        return next->block_size(next, minimum, preferred, maximum);
    }
    virtual int can_write(nbdkit_next *next) { return next->can_write(next); }
    virtual int can_flush(nbdkit_next *next) { return next->can_flush(next); }
    virtual int is_rotational(nbdkit_next *next) { return next->is_rotational(next); }
    virtual int can_trim(nbdkit_next *next) { return next->can_trim(next); }
    virtual int can_zero(nbdkit_next *next) { return next->can_zero(next); }
    virtual int can_fast_zero(nbdkit_next *next) { return next->can_fast_zero(next); }
    virtual int can_extents(nbdkit_next *next) { return next->can_extents(next); }
    virtual int can_fua(nbdkit_next *next) { return next->can_fua(next); }
    virtual int can_multi_conn(nbdkit_next *next) { return next->can_multi_conn(next); }
    virtual int can_cache(nbdkit_next *next) { return next->can_cache(next); }

    virtual int pread(nbdkit_next *next, void *buffer, std::uint32_t count, std::uint64_t offset, std::uint32_t flags,
                      int *err) {
        return next->pread(next, buffer, count, offset, flags, err);
    }
    virtual int pwrite(nbdkit_next *next, const void *buffer, std::uint32_t count, std::uint64_t offset,
                       std::uint32_t flags, int *err) {
        return next->pwrite(next, buffer, count, offset, flags, err);
    }
    virtual int flush(nbdkit_next *next, std::uint32_t flags, int *err) { return next->flush(next, flags, err); }
    virtual int trim(nbdkit_next *next, std::uint32_t count, std::uint64_t offset, std::uint32_t flags, int *err) {
        return next->trim(next, count, offset, flags, err);
    }
    virtual int zero(nbdkit_next *next, std::uint32_t count, std::uint64_t offset, std::uint32_t flags, int *err) {
        return next->zero(next, count, offset, flags, err);
    }
    virtual int extents(nbdkit_next *next, std::uint32_t count, std::uint64_t offset, std::uint32_t flags,
                        nbdkit_extents *extents, int *err) {
        return next->extents(next, count, offset, flags, extents, err);
    }
    virtual int cache(nbdkit_next *next, std::uint32_t count, std::uint64_t offset, std::uint32_t flags, int *err) {
        return next->cache(next, count, offset, flags, err);
    }
};

} // namespace qlean
