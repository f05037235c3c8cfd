// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// What `zeroes` takes for zeroes.
#include "lib/compact/zero_scan.h"
#include "tests/fault/image_judge.h"
#include "tests/fault/scene.h"

using namespace qlean;
using namespace qlean::fault;

TEST_CASE("zeroes: one byte anywhere in a cluster keeps it, and a cluster of zeroes goes") {
    constexpr std::uint64_t size = 65536;
    const std::vector<std::uint64_t> places{0, 1, 4095, 4096, 4097, size / 2, size - 4096, size - 1};
    ImagePlan plan;
    plan.cluster_bits = 16;
    plan.virtual_size = 2 * places.size() * size;
    plan.map_all(8);
    Scene s(build_image(plan).bytes);
    Bytes model(plan.virtual_size);
    for (std::size_t i = 0; i < places.size(); ++i)
        model[2 * i * size + places[i]] = std::byte{1};
    s.image->write(model, {0});
    ZeroScan zeroes(*s.image, s.gauges);
    zeroes.run({0}, s.image->size(), never);
    zeroes.commit(never);
    std::vector<Mapping> mappings(2 * places.size());
    s.image->state().mapper.survey({0}, mappings);
    for (std::size_t i = 0; i < mappings.size(); ++i) {
        INFO("cluster " << i);
        CHECK(mappings[i].has_host() == (i % 2 == 0));
    }
    Bytes now(model.size());
    s.image->read(now, {0});
    CHECK((now == model));
    s.image->close();
    CHECK(judge(s.disk->bytes()).clean());
}
