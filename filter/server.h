// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// What the filter knows for the whole life of the server: its options and, once the first client has come, the watcher
// of the disk. The watcher is made at most once and never replaced, so exports may keep a pointer to it.

#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include <nbdkit-filter.h>

#include "filter/export.h"
#include "filter/watcher.h"
#include "lib/thread_safety.h"
#include "plugin/maintainers.h"

namespace qlean {

class Server {
  public:
    /// True if the option was ours. Throws std::runtime_error on a bad value.
    bool config(const std::string &key, const char *value);

    /// The plugin's own name for its default export.
    void set_default_name(const std::string &name);

    /// Whether whoever is connected to this thread may open `reclaim`.
    bool offers_reclaim() const { return maintainers_.include_peer(); }

    std::unique_ptr<Export> open(nbdkit_next_open *next, nbdkit_context *context, int readonly,
                                 const std::string &name);

  private:
    Watcher *watcher(nbdkit_context *context);
    static const char *disk_below(nbdkit_context *context);
    std::uint32_t learn_cluster_size(nbdkit_backend *backend, std::uint32_t preferred) const;
    bool is_default(const std::string &name);

    std::uint32_t cluster_size_ = 0; ///< as configured; 0: learn it
    std::size_t memory_ = 64 << 20;
    plugin::Maintainers maintainers_;

    Mutex mutex_;
    std::string default_name_ PROTECTED_BY(mutex_);
    /// Somebody may be changing the disk without the watcher's lock.
    bool unwatched_writer_ PROTECTED_BY(mutex_) = false;
    std::unique_ptr<Watcher> watcher_ PROTECTED_BY(mutex_); ///< set once
};

} // namespace qlean
