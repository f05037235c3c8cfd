// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "contents.h"

#include "error.h"

#include <cstring>

namespace qlean {

bool Contents::is_zero(GuestCluster c, const Mapping &mapping) const {
    if (mapping.is_zero())
        return true;
    return mapping.kind == Mapping::Kind::unallocated && ends_below(c);
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
        throw Error(Error::Kind::unsupported, EIO,
                    fmt::format("'{}': the cluster at guest offset {:#x} has subclusters, which is not supported yet",
                                data_.name(), geometry_.offset_of(c).value));
    case Kind::damaged:
        throw_bad_image("'{}' is damaged: the L2 entry of guest offset {:#x} points to no valid cluster; stop the "
                        "server and run 'qemu-img check'",
                        data_.name(), geometry_.offset_of(c).value);
    }
}

} // namespace qlean
