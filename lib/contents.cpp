// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "contents.h"

#include "error.h"
#include "subcluster_mapping.h"

#include <cstring>

namespace qlean {

bool Contents::is_zero(GuestCluster c, const Mapping &mapping) const {
    if (mapping.is_zero())
        return true;
    if (mapping.is_mixed()) {
        const subclusters::Bitmap bitmap(mapping.bits);
        return bitmap.data() == 0 && (bitmap.unallocated() == 0 || is_zero(c, {}));
    }
    return mapping.kind == Mapping::Kind::unallocated && ends_below(c);
}

bool Contents::zero_below(GuestOffset at, std::uint64_t length) const {
    constexpr std::size_t most = 64;
    std::uint64_t told = 0;
    for (const Backing::Extent &extent : below_->extents(at, length, most)) {
        if (!extent.zero)
            return false;
        told += extent.length;
    }
    return told >= length;
}

void Contents::read(GuestCluster c, const Mapping &mapping, std::uint64_t within, std::span<std::byte> into) {
    using Kind = Mapping::Kind;
    switch (mapping.kind) {
    case Kind::data:
        return data_.read(into, geometry_.offset_of(mapping.host) + within);
    case Kind::unallocated:
        if (!ends_below(c))
            return below_->read(into, geometry_.offset_of(c) + within);
        [[fallthrough]];
    case Kind::zero:
    case Kind::zero_allocated:
        std::memset(into.data(), 0, into.size());
        return;
    case Kind::compressed:
        return compressed_.read(c, mapping.bits, within, into);
    case Kind::mixed:
    case Kind::mixed_allocated:
        return subclusters::each_piece(geometry_, mapping, within, into.size(),
                                       [&](const Mapping &piece, std::uint64_t at, std::uint64_t n) {
                                           read(c, piece, at, into.subspan(at - within, n));
                                       });
    case Kind::damaged:
        throw_bad_image("'{}' is damaged: the L2 entry of guest offset {:#x} points to no valid cluster; stop the "
                        "server and run 'qemu-img check'",
                        data_.name(), geometry_.offset_of(c).value);
    }
}

} // namespace qlean
