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

TEST_CASE("zeroes: what the guest did between the first look at a cluster and the second counts") {
    constexpr std::uint64_t size = 16384, sub = size / 32, place = 1;
    const bool extended = GENERATE(false, true);
    const bool elsewhere = GENERATE(false, true); // the cluster has another place by then, and its own another owner
    INFO("extended " << extended << " elsewhere " << elsewhere);
    ImagePlan plan;
    plan.cluster_bits = 14;
    plan.virtual_size = 16 * size;
    plan.extended = extended;
    plan.data = {{0, 2}, {5, place}, {6, 3}};
    plan.metadata_at = 4; // the lowest place, once it is free
    Scene s(build_image(plan).bytes);
    Bytes model = read_all(*s.image);
    const auto write = [&](std::uint64_t at, std::uint64_t length, unsigned value) {
        s.image->write(bytes_of(length, value), {at});
        std::fill_n(model.begin() + static_cast<std::ptrdiff_t>(at), length, std::byte(value));
    };
    write(5 * size, size, 0);
    s.image->flush();
    ZeroScan zeroes(*s.image, s.gauges);
    Beside scan;
    // Its last byte: the first read is of a part.
    Breakpoint first_look(s.disk, Breakpoint::When::after, touches(Op::read, (place + 1) * size - 1, 1));
    scan.start([&] { zeroes.run({0}, s.image->size(), never); });
    REQUIRE(first_look.wait());
    if (elsewhere) {
        s.image->trim({5 * size}, size);
        s.image->state().write_back.commit(WriteBack::Give::back);
        write(9 * size, size, 0x99);
        write(9 * size + 2 * sub, 8 * sub, 0); // what a scan that looks there would find
        std::vector<Mapping> ninth(1);
        s.image->state().mapper.survey({9}, ninth);
        REQUIRE(ninth.front().host == HostCluster{place});
        write(5 * size, size, 0);
        write(5 * size + 3 * sub, sub, 0x55);
    } else {
        write(5 * size + 7, 9, 0x55);
    }
    first_look.release();
    scan.join();
    zeroes.commit(never);
    CHECK((read_all(*s.image) == model));
    s.image->close();
    CHECK((guest_bytes(s.disk->bytes()) == model));
    CHECK(judge(s.disk->bytes()).clean());
}
