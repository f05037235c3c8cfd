// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "tests/fault/recorded_guest.h"

#include "lib/error.h"

#include <stdexcept>

namespace qlean::fault {

RecordedGuest::RecordedGuest(Image &image, FaultyDisk &disk, std::uint64_t seed)
    : image_(image), disk_(disk), random_(seed), model_(image.size()) {
    image_.read(model_, {0});
    promises_.push_back({0, 0, model_});
}

std::byte RecordedGuest::value(const Change &change, std::uint64_t at) {
    std::uint64_t x = (at + 1) * 0x9e3779b97f4a7c15u ^ change.salt;
    x ^= x >> 29;
    x *= 0xbf58476d1ce4e5b9u;
    return std::byte(1 + (x >> 40) % 255);
}

template <class F>
void RecordedGuest::change(Kind kind, std::uint64_t at, std::uint64_t length, F &&request) {
    const Change change{kind, disk_.recorded(), at, length, random_()};
    changes_.push_back(change);
    const auto read_back = [&] {
        const FaultyDisk::Truce truce(disk_);
        image_.read(std::span(model_).subspan(at, length), {at});
    };
    try {
        request(change);
    } catch (const Error &) {
        if (forgiving_)
            read_back(); // part of it may have been done; verdict() knows what each byte may be
        throw;
    }
    switch (kind) {
    case Kind::write:
        for (std::uint64_t i = 0; i < length; ++i)
            model_[at + i] = value(change, at + i);
        break;
    case Kind::zero:
        std::fill_n(model_.begin() + static_cast<std::ptrdiff_t>(at), length, std::byte{0});
        break;
    case Kind::trim: {
        const Bytes before(model_.begin() + static_cast<std::ptrdiff_t>(at),
                           model_.begin() + static_cast<std::ptrdiff_t>(at + length));
        read_back();
        for (std::uint64_t i = 0; i < length; ++i)
            if (model_[at + i] != std::byte{0} && model_[at + i] != before[i])
                throw std::runtime_error(fmt::format("trimmed byte {:#x} is neither what it was nor zero", at + i));
        break;
    }
    }
}

void RecordedGuest::write(std::uint64_t at, std::uint64_t length) {
    change(Kind::write, at, length, [&](const Change &change) {
        Bytes bytes(length);
        for (std::uint64_t i = 0; i < length; ++i)
            bytes[i] = value(change, at + i);
        image_.write(bytes, {at});
    });
}

void RecordedGuest::trim(std::uint64_t at, std::uint64_t length) {
    change(Kind::trim, at, length, [&](const Change &) { image_.trim({at}, length); });
}

void RecordedGuest::zero(std::uint64_t at, std::uint64_t length, Image::Zero how) {
    change(Kind::zero, at, length, [&](const Change &) { image_.zero({at}, length, how, false); });
}

void RecordedGuest::flush() {
    Promise promise{0, changes_.size(), model_};
    image_.flush();
    promise.since = disk_.recorded();
    promises_.push_back(std::move(promise));
}

void RecordedGuest::check(std::uint64_t at, std::uint64_t length) {
    Bytes bytes(length);
    image_.read(bytes, {at});
    for (std::uint64_t i = 0; i < length; ++i)
        if (bytes[i] != model_[at + i])
            throw std::runtime_error(fmt::format("byte {:#x} of the disk reads {:#04x}, should be {:#04x}", at + i,
                                                 std::to_integer<int>(bytes[i]), std::to_integer<int>(model_[at + i])));
}

void RecordedGuest::step(const Mix &mix) {
    const std::uint64_t cluster = image_.geometry().cluster_size();
    const std::uint64_t end = std::min(mix.end, image_.size());
    std::uint64_t at = mix.first + random_() % (end - mix.first);
    std::uint64_t length = 1 + random_() % std::min(mix.most, end - at);
    switch (random_() % 4) {
    case 0: // whole clusters
        at = round_down(at, cluster);
        length = std::min(round_up(length, cluster), end - at);
        break;
    case 1: // one host block, or part of a cluster
        at = round_down(at, std::min<std::uint64_t>(cluster, 4096));
        length = std::min<std::uint64_t>({cluster, 4096, end - at});
        break;
    default:
        break;
    }
    const unsigned total = mix.write + mix.trim + mix.zero + mix.flush + mix.check;
    auto pick = static_cast<unsigned>(random_() % total);
    if (pick < mix.write)
        return write(at, length);
    pick -= mix.write;
    if (pick < mix.trim)
        return trim(at, length);
    pick -= mix.trim;
    if (pick < mix.zero)
        return zero(at, length, random_() % 2 ? Image::Zero::may_trim : Image::Zero::keep_space);
    pick -= mix.zero;
    if (pick < mix.flush)
        return flush();
    check(at, length);
}

std::optional<std::string> RecordedGuest::verdict(const Bytes &disk, std::size_t moment) const {
    const Promise *promise = nullptr;
    for (const Promise &p : promises_)
        if (p.since <= moment)
            promise = &p;
    if (disk.size() != promise->disk.size())
        return "the disk has another size";
    constexpr std::size_t chunk = 512;
    std::vector<const Change *> here;
    for (std::size_t begin = 0; begin < disk.size(); begin += chunk) {
        const std::size_t end = std::min(begin + chunk, disk.size());
        if (same_bytes(std::span(disk).subspan(begin, end - begin),
                       std::span(promise->disk).subspan(begin, end - begin)))
            continue;
        here.clear();
        for (std::size_t i = promise->changes; i < changes_.size() && changes_[i].began < moment; ++i)
            if (changes_[i].at < end && begin < changes_[i].at + changes_[i].length)
                here.push_back(&changes_[i]);
        for (std::size_t at = begin; at < end; ++at) {
            const bool allowed =
                disk[at] == promise->disk[at] || std::any_of(here.rbegin(), here.rend(), [&](const Change *c) {
                    return c->at <= at && at < c->at + c->length &&
                           disk[at] == (c->kind == Kind::write ? value(*c, at) : std::byte{0});
                });
            if (!allowed)
                return fmt::format("byte {:#x} is {:#04x}; the flush acknowledged at moment {} promised {:#04x}, and "
                                   "no change begun before moment {} wrote that",
                                   at, std::to_integer<int>(disk[at]), promise->since,
                                   std::to_integer<int>(promise->disk[at]), moment);
        }
    }
    return std::nullopt;
}

} // namespace qlean::fault
