// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The export `resize/BYTES`: CACHE makes the disk that large, while all other requests wait; FLUSH commits. Refused
// while somebody owns the operations that move clusters: nobody should wait for those to end. Whoever is
// connected keeps the size that the disk had; a new connection sees the new one.
#pragma once

#include "exports.h"

namespace qlean::plugin {

inline constexpr std::string_view resize_prefix = "resize/";

/// `name` begins with the prefix. Throws Error if what follows is no size.
std::unique_ptr<Export> open_resize(Server &server, const std::string &name, bool read_only, std::uint64_t connection);

} // namespace qlean::plugin
