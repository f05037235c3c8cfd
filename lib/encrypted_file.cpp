// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "encrypted_file.h"

#include <cstring>

namespace qlean {

namespace {

constexpr std::uint64_t sector = SectorCipher::sector;
/// Encrypted in memory at a time.
constexpr std::uint64_t step = 256 * 1024;

/// The lock's own name for a place in the file.
GuestOffset place(HostOffset at) { return {at.value}; }

std::uint64_t number(HostOffset at) { return at.value / sector; }

bool whole_sectors(HostOffset at, std::uint64_t length) { return at.value % sector == 0 && length % sector == 0; }

} // namespace

EncryptedFile::EncryptedFile(File &below, SectorCipher cipher)
    : below_(below), cipher_(std::move(cipher)), sectors_(Geometry(16, 4, 0)) {}

EncryptedFile::EncryptedFile(std::unique_ptr<File> below, SectorCipher cipher)
    : owned_(std::move(below)), below_(*owned_), cipher_(std::move(cipher)), sectors_(Geometry(16, 4, 0)) {}

template <class ReadBelow>
bool EncryptedFile::read_with(std::span<std::byte> into, HostOffset at, ReadBelow &&read_below) {
    if (into.empty())
        return true;
    const RangeLock::Shared guard(sectors_, place(at), into.size());
    if (whole_sectors(at, into.size())) {
        if (!read_below(into, at))
            return false;
        cipher_.decrypt(into, into, number(at));
        return true;
    }
    const HostOffset first{round_down(at.value, sector)};
    std::vector<std::byte> sectors(round_up(at.value + into.size(), sector) - first.value);
    if (!read_below(sectors, first))
        return false;
    cipher_.decrypt(sectors, sectors, number(first));
    std::memcpy(into.data(), sectors.data() + (at - first), into.size());
    return true;
}

void EncryptedFile::read(std::span<std::byte> into, HostOffset at) {
    read_with(into, at, [&](std::span<std::byte> bytes, HostOffset from) {
        below_.read(bytes, from);
        return true;
    });
}

bool EncryptedFile::read_cached(std::span<std::byte> into, HostOffset at) {
    return read_with(into, at,
                     [&](std::span<std::byte> bytes, HostOffset from) { return below_.read_cached(bytes, from); });
}

void EncryptedFile::write_sectors(std::span<const std::byte> from, HostOffset at) {
    const auto encrypted = std::make_unique_for_overwrite<std::byte[]>(std::min<std::uint64_t>(from.size(), step));
    while (!from.empty()) {
        const auto piece = from.first(std::min<std::uint64_t>(from.size(), step));
        const std::span<std::byte> sectors(encrypted.get(), piece.size());
        cipher_.encrypt(piece, sectors, number(at));
        below_.write(sectors, at);
        from = from.subspan(piece.size());
        at += piece.size();
    }
}

void EncryptedFile::write(std::span<const std::byte> from, HostOffset at) {
    if (from.empty())
        return;
    if (whole_sectors(at, from.size())) {
        const RangeLock::Shared guard(sectors_, place(at), from.size());
        return write_sectors(from, at);
    }
    // The sectors at both ends keep what is not written; what lies between them goes straight through.
    const RangeLock::Exclusive guard(sectors_, place(at), from.size());
    const auto patch = [&](std::span<const std::byte> bytes, HostOffset to) {
        std::byte plain[sector];
        const HostOffset first{round_down(to.value, sector)};
        below_.read(plain, first);
        cipher_.decrypt(plain, plain, number(first));
        std::memcpy(plain + (to - first), bytes.data(), bytes.size());
        write_sectors(plain, first);
    };
    if (const std::uint64_t within = at.value % sector; within != 0) {
        const auto head = from.first(std::min<std::uint64_t>(from.size(), sector - within));
        patch(head, at);
        from = from.subspan(head.size());
        at += head.size();
    }
    const auto middle = from.first(round_down(from.size(), sector));
    write_sectors(middle, at);
    if (middle.size() < from.size())
        patch(from.subspan(middle.size()), at + middle.size());
}

} // namespace qlean
