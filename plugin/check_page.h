// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The export `check`: a page of fixed size with the verdict on the image, as JSON. A read of its first byte checks the
// image anew; CACHE repairs leaks, FLUSH commits that. Its fields are documented in nbdkit-qcow2-plugin(1).
#pragma once

#include "exports.h"

namespace qlean::plugin {

/// Of the server's image, beside its guest; or of the file alone, if the server was started to check it.
std::unique_ptr<Export> open_check_export(Server &server, bool read_only, std::uint64_t connection);

/// Opens and locks the file that is to be checked and not served, and repairs it if that was asked for.
void prepare_check_only(Server &server);

} // namespace qlean::plugin
