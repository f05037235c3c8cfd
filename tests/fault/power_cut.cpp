// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "tests/fault/power_cut.h"

#include <cstring>

namespace qlean::fault {

namespace {

constexpr std::uint64_t sector = FaultyDisk::sector;

void put(Bytes &image, std::uint64_t begin, std::uint64_t end, const Event &event) {
    if (image.size() < end)
        image.resize(end);
    if (event.kind == Event::Kind::write)
        std::memcpy(image.data() + begin, event.bytes.data() + (begin - event.at), end - begin);
    else
        std::memset(image.data() + begin, 0, end - begin);
}

void apply(Bytes &image, const Event &event) {
    if (event.kind == Event::Kind::length)
        image.resize(event.at);
    else if (event.kind == Event::Kind::write || event.kind == Event::Kind::zeroes)
        put(image, event.at, event.at + event.length, event);
}

bool changes(const Event &event) {
    return event.kind == Event::Kind::write || event.kind == Event::Kind::zeroes || event.kind == Event::Kind::length;
}

template <class F>
std::vector<Fate> make_fates(std::size_t count, F &&reached) {
    std::vector<Fate> fates(count);
    for (std::size_t i = 0; i < count; ++i)
        fates[i].reached = reached(i);
    return fates;
}

} // namespace

std::vector<Fate> numbered_fates(const PowerCuts &cuts, std::uint64_t number) {
    return make_fates(cuts.uncertain().size(), [&](std::size_t i) { return number >> i & 1; });
}

std::vector<Fate> random_fates(const PowerCuts &cuts, std::mt19937_64 &random) {
    const auto &changes = cuts.uncertain();
    const std::size_t n = changes.size(), a = n == 0 ? 0 : random() % n, b = n == 0 ? 0 : random() % n;
    switch (random() % 8) {
    case 0: // one is missing
        return make_fates(n, [&](std::size_t i) { return i != a; });
    case 1: // one alone
        return make_fates(n, [&](std::size_t i) { return i == a; });
    case 2: // the later ones
        return make_fates(n, [&](std::size_t i) { return i >= a; });
    case 3: // file system operations early, or late
        return make_fates(n, [&](std::size_t i) { return (changes[i]->kind != Event::Kind::write) == (a & 1); });
    case 4: // a window is missing
        return make_fates(n, [&](std::size_t i) { return i < std::min(a, b) || i >= std::max(a, b); });
    case 5: { // torn
        auto fates = make_fates(n, [&](std::size_t i) { return i == a || random() % 2; });
        for (std::size_t i = 0; i < n; ++i)
            if (fates[i].reached && changes[i]->kind != Event::Kind::length && random() % 2)
                for (int s = 0; s < 64; ++s)
                    fates[i].sectors.push_back(random() % 2);
        return fates;
    }
    default: {
        const unsigned odds = 1 + random() % 7;
        return make_fates(n, [&](std::size_t) { return random() % 8 < odds; });
    }
    }
}

PowerCuts::PowerCuts(const FaultyDisk &disk) : events_(disk.events()), base_(disk.first_bytes()) {
    std::size_t certain = 0, began = 0;
    bool lost = false; // a sync failed: nothing that was uncertain then becomes certain again
    certain_until_.push_back(0);
    for (std::size_t i = 0; i < events_.size(); ++i) {
        if (events_[i].kind == Event::Kind::sync_began)
            began = i;
        else if (events_[i].kind == Event::Kind::sync_failed)
            lost = true;
        else if (events_[i].kind == Event::Kind::sync_ended && !lost)
            certain = began;
        certain_until_.push_back(certain);
    }
}

void PowerCuts::move_to(std::size_t cut) {
    cut_ = cut;
    for (; applied_ < certain_until_[cut]; ++applied_)
        apply(base_, events_[applied_]);
    uncertain_.clear();
    for (std::size_t i = applied_; i < cut; ++i)
        if (changes(events_[i]))
            uncertain_.push_back(&events_[i]);
}

Bytes PowerCuts::image_of_killed() const {
    Bytes image = base_;
    for (const Event *event : uncertain_)
        apply(image, *event);
    return image;
}

Bytes PowerCuts::image(const std::vector<Fate> &fates) const {
    const std::size_t count = uncertain_.size();
    const auto first_sector = [](const Event &e) { return e.at / sector; };
    const auto end_sector = [](const Event &e) { return divide_up(e.at + e.length, sector); };

    // The last change that reached each sector carries all earlier ones with it; likewise for the length.
    std::uint64_t sectors = divide_up(base_.size(), sector);
    std::size_t last_length = count;
    for (std::size_t i = 0; i < count; ++i)
        sectors = std::max(sectors, uncertain_[i]->kind == Event::Kind::length ? divide_up(uncertain_[i]->at, sector)
                                                                               : end_sector(*uncertain_[i]));
    std::vector<std::uint32_t> reached(sectors, 0); // number of changes: 1 + index of the last one
    for (std::size_t i = 0; i < count; ++i) {
        const Event &event = *uncertain_[i];
        if (!fates[i].reached)
            continue;
        if (event.kind == Event::Kind::length) {
            last_length = i;
            continue;
        }
        for (std::uint64_t s = first_sector(event); s < end_sector(event); ++s)
            if (fates[i].sectors.empty() || fates[i].sectors[(s - first_sector(event)) % fates[i].sectors.size()])
                reached[s] = static_cast<std::uint32_t>(i + 1);
    }

    Bytes image = base_;
    std::uint64_t length = base_.size();
    for (std::size_t i = 0; i < count; ++i) {
        const Event &event = *uncertain_[i];
        if (event.kind == Event::Kind::length) {
            // A file that was cut holds nothing beyond, whatever its length is later.
            const bool cut = last_length != count && i <= last_length;
            if (cut)
                length = event.at;
            for (std::uint64_t s = event.at / sector; s * sector < image.size(); ++s)
                if (cut || reached[s] > i + 1) {
                    const std::uint64_t begin = std::max(s * sector, event.at);
                    if (begin < image.size())
                        std::memset(image.data() + begin, 0,
                                    std::min<std::uint64_t>((s + 1) * sector, image.size()) - begin);
                }
            continue;
        }
        for (std::uint64_t s = first_sector(event); s < end_sector(event);) {
            if (reached[s] < i + 1) {
                ++s;
                continue;
            }
            std::uint64_t stop = s;
            while (stop < end_sector(event) && reached[stop] >= i + 1)
                ++stop;
            put(image, std::max(event.at, s * sector), std::min(event.at + event.length, stop * sector), event);
            s = stop;
        }
    }
    image.resize(length);
    return image;
}

} // namespace qlean::fault
