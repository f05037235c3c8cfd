// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// What a connection can ask of the export it opened: the disk, a maintenance operation, or the status page. What an
// export does not allow throws Error with EPERM.
#pragma once

#include "lib/image.h"
#include "server.h"

#include <cstring>
#include <functional>
#include <memory>
#include <span>
#include <string>

namespace qlean::plugin {

class Export {
  public:
    struct Abilities {
        bool write = false, cache = false, extents = false, multi_conn = false;
    };
    /// Takes one extent; false: no more wanted.
    using AddExtent = std::function<bool(std::uint64_t at, std::uint64_t length, bool hole, bool zero)>;

    virtual ~Export() = default;
    virtual std::uint64_t size() const = 0;
    virtual Abilities abilities() const = 0;
    virtual std::string description() const = 0;

    virtual void read(std::span<std::byte> into, std::uint64_t at) = 0;
    virtual void write(std::span<const std::byte> from, std::uint64_t at);
    virtual void flush() = 0;
    virtual void trim(std::uint64_t at, std::uint64_t length);
    virtual void zero(std::uint64_t at, std::uint64_t length, bool may_trim, bool fast);
    virtual void extents(std::uint64_t at, std::uint64_t length, std::size_t most, const AddExtent &add);
    virtual void cache(std::uint64_t at, std::uint64_t length);

    /// cache() wants that nothing else runs, and passes the gate by itself.
    virtual bool caches_alone() const { return false; }
    /// What it holds stays true when the disk is resized.
    virtual bool survives_resize() const { return false; }
    std::uint64_t resizes_before = 0; ///< when the connection opened it
};

/// The names that are served, the disk's ("") first.
std::vector<std::string> export_names(Server &server);
/// Throws Error if there is no export of that name.
std::unique_ptr<Export> open_export(Server &server, const std::string &name, bool read_only);

} // namespace qlean::plugin
