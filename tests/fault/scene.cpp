// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "tests/fault/scene.h"

#include <cstdlib>

namespace qlean::fault {

Scene::Scene(Bytes bytes, std::uint64_t cache_bytes, bool settled)
    : disk(std::make_shared<FaultyDisk>(std::move(bytes))) {
    disk->record();
    image = open_image(disk, false, cache_bytes);
    if (settled)
        image->give_back();
    guest = std::make_unique<RecordedGuest>(*image, *disk, fresh_seed());
}

std::string Scene::cut_everywhere(std::uint64_t seed, int ways, std::size_t from) {
    constexpr std::size_t exhausted_up_to = 5;
    image.reset();
    std::mt19937_64 random(seed);
    PowerCuts cuts(*disk);
    for (std::size_t moment = from; moment < cuts.moments(); ++moment) {
        cuts.move_to(moment);
        const auto judge_one = [&](const Bytes &left, const char *how) -> std::string {
            if (const Verdict verdict = judge(left); !verdict.sound())
                return fmt::format("{} at moment {} of {}: {}", how, moment, cuts.moments(), verdict.text());
            if (const auto lost = guest->verdict(guest_bytes(left), moment))
                return fmt::format("{} at moment {} of {}: {}", how, moment, cuts.moments(), *lost);
            return {};
        };
        std::string wrong = judge_one(cuts.image_of_killed(), "killed");
        const std::size_t n = cuts.uncertain().size();
        if (n <= exhausted_up_to) {
            for (std::uint64_t number = 0; number < std::uint64_t{1} << n && wrong.empty(); ++number)
                wrong = judge_one(cuts.image(numbered_fates(cuts, number)), "power cut");
        } else {
            for (int i = 0; i < ways && wrong.empty(); ++i)
                wrong = judge_one(cuts.image(random_fates(cuts, random)), "power cut");
        }
        if (!wrong.empty())
            return wrong;
    }
    return {};
}

Filter is(Op op) {
    return [=](const Request &r) { return r.op == op; };
}

Filter touches(Op op, std::uint64_t at, std::uint64_t length) {
    return [=](const Request &r) { return r.op == op && r.at < at + length && at < r.at + r.length; };
}

std::uint64_t fresh_seed() {
    if (const char *text = std::getenv("QLEAN_SEED"))
        return std::strtoull(text, nullptr, 10);
    return std::random_device{}();
}

bool all_are(const Bytes &bytes, unsigned value) {
    return std::all_of(bytes.begin(), bytes.end(), [&](std::byte b) { return b == std::byte(value); });
}

} // namespace qlean::fault
