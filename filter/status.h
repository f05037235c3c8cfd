// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The plugin's status page (a JSON object padded to a fixed size): what the filter reads in it and what it adds.

#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace qlean {

/// The size of the status page, fixed so that the export's size is.
inline constexpr std::size_t status_page_size = 65536;

/// The filter's part of the status.
struct ReclaimStatus {
    std::uint32_t granularity = 0;
    std::uint64_t recorded_bytes = 0;   ///< discarded or zeroed, not yet given back
    std::uint64_t ready_bytes = 0;      ///< of these, in clusters that can be given back
    std::uint64_t given_back_bytes = 0; ///< clusters given back since the server started
};

/// The page with the filter's part added, of the same size. Nothing if the page isn't a JSON object or has no room:
/// then it should be passed on as it is.
std::optional<std::string> with_reclaim_status(std::string_view page, const ReclaimStatus &status);

/// The image's cluster size, if the page tells it.
std::optional<std::uint64_t> cluster_size_in(std::string_view page);

} // namespace qlean
