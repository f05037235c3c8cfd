// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The rules of compaction as a whole: what moves when and when it is done (C1), where to (C2), who may and how it is
// stopped (C2, C3), tables of nothing (C9).
#include "lib/byte_order.h"
#include "lib/compression.h"
#include "tests/fault/scene_moves.h"

#include <optional>

using namespace qlean;
using namespace qlean::fault;

namespace {

/// Done, as a compaction says it, and sound.
void check_compacted(const Scene &s) {
    CHECK(s.gauges.pending == 0);
    CHECK(s.disk->length() == static_cast<std::uint64_t>(s.gauges.ideal_end.load()));
    CHECK(judge(s.disk->bytes()).clean());
}

void check_nothing_planned(Scene &s) {
    Compact again(*s.image, s.ownership, s.gauges, 8);
    for (const auto &p : again.plan({0}, s.image->size(), 1000))
        CHECK_FALSE(p.to_do);
}

} // namespace

TEST_CASE("C1: what has no guest offset moves in the commit; done is an empty plan and nothing pending") {
    const BuiltImage built = build_image(metadata_last());
    Scene s(built.bytes);
    {
        Compact compact(*s.image, s.ownership, s.gauges, 7);
        const auto plan = compact.plan({0}, s.image->size(), 1000);
        // The first mapped cluster of each table that has to move stands for the table.
        for (std::uint64_t table = 0; table < 4; ++table) {
            const std::uint64_t first = divide_up(table * 64, 3) * 3 * cluster;
            CHECK(std::any_of(plan.begin(), plan.end(), [&](const auto &p) {
                return p.to_do && p.at.value <= first && first < p.at.value + p.length;
            }));
        }
        CHECK(s.gauges.pending > 0);
    }
    compact(s);
    check_compacted(s);
    check_nothing_planned(s);
}

TEST_CASE("C1: a refcount block that the file would want only because of that block's own cluster goes") {
    // With the number of clusters the end of the file moves over what one block describes.
    for (unsigned count = 1; count <= 260; ++count) {
        INFO(count << " clusters of data");
        ImagePlan plan;
        plan.virtual_size = 600 * cluster;
        for (std::uint64_t i = 0; i < count; ++i)
            plan.data[2 * i] = 10 + 2 * i;
        plan.metadata_at = 700;
        Scene s(build_image(plan).bytes);
        compact(s);
        check_compacted(s);
    }
}

namespace {

/// So long, what is new being somebody's garbage.
Bytes lengthened(Bytes image, std::uint64_t clusters) {
    REQUIRE(image.size() < clusters * cluster);
    image.resize(clusters * cluster, std::byte{0xaa});
    return image;
}

constexpr std::uint64_t region = 256; ///< what a refcount block describes

/// The region that the file ends in gets a refcount block, as where a guest needed room.
void link_end(Scene &s) {
    REQUIRE(finds_no_room(*s.image));
    s.image->give_back();
}

/// Clusters that are free between those that are not: a guest gets one without looking for more.
ImagePlan with_free_ones() {
    ImagePlan plan;
    plan.virtual_size = 600 * cluster;
    plan.map(100, 20, 2);
    return plan;
}

} // namespace

TEST_CASE("C1: what the file has behind all that it holds is cut, also where no refcount block describes it") {
    const Bytes image = build_image(with_free_ones()).bytes;
    REQUIRE(image.size() < region * cluster);
    const bool beside = GENERATE(false, true), linked = GENERATE(true, false);
    std::uint64_t expected = 0;
    for (const std::uint64_t length : {std::uint64_t{0}, region - 1, region, region + 1, 2 * region - 1, 2 * region,
                                       2 * region + 1, 9 * region + 17, 64 * region, 64 * region + 3}) {
        INFO(length << " clusters" << (beside ? ", beside a guest" : "") << (linked ? ", its end linked" : ""));
        Scene s(length == 0 ? image : lengthened(image, length));
        if (linked && length != 0)
            link_end(s);
        const Bytes model = read_all(*s.image);
        if (beside) { // changes between the passes and the commits
            std::uint64_t next = 200;
            compact(s, [&] {
                s.image->write(bytes_of(cluster, 7), {next++ * cluster});
                s.image->flush();
            });
            s.image->trim({200 * cluster}, (next - 200) * cluster);
            s.image->flush();
        }
        compact(s);
        check_compacted(s);
        if (expected == 0)
            expected = s.disk->length();
        CHECK(s.disk->length() == expected);
        CHECK((read_all(*s.image) == model));
    }
}

TEST_CASE("C1: what lies behind regions without a refcount block moves below them, and they are cut") {
    ImagePlan plan;
    plan.virtual_size = 600 * cluster;
    plan.map(100, 20);
    for (std::uint64_t c = 300; c < 340; ++c)
        plan.data[c] = 5 * region + c;
    plan.metadata_at = 6;
    BuiltImage built = build_image(plan);
    for (std::uint64_t r = 1; r < 5; ++r)
        built.set_word(built.refcount_table + r * 8, 0);
    Scene s(built.bytes);
    const Bytes model = read_all(*s.image);
    compact(s);
    check_compacted(s);
    CHECK(s.disk->length() < region * cluster);
    CHECK((read_all(*s.image) == model));
}

TEST_CASE("C1: regions without a refcount block count in E where what is live does not fit below them") {
    // What a copy of a device becomes on which a guest went on: all of that region is in use, and all behind it.
    for (const std::uint64_t behind : {200, 600}) {
        INFO(behind << " clusters behind");
        ImagePlan plan;
        plan.virtual_size = 1200 * cluster;
        plan.metadata_at = 1;
        plan.table_clusters = 2;
        plan.map(140, 112);
        for (std::uint64_t c = 0; c < behind; ++c)
            plan.data[300 + c] = 80 * region + 2 * c;
        BuiltImage built = build_image(plan);
        REQUIRE(built.refcount_blocks.back() < 112 * cluster);
        for (std::uint64_t r = 1; r < 80; ++r)
            built.set_word(built.refcount_table + r * 8, 0);
        Scene s(built.bytes);
        const Bytes model = read_all(*s.image);
        compact(s);
        check_compacted(s);
        check_nothing_planned(s);
        CHECK((read_all(*s.image) == model));
    }
}

TEST_CASE("C1: a tail that gets a refcount block after the walk is free then") {
    ImagePlan plan = with_free_ones();
    plan.autoclear = GENERATE(0, 0xc); // nothing is linked before such bits are cleared
    Scene s(lengthened(build_image(plan).bytes, 9 * region + 17));
    Bytes model;
    {
        Compact compact(*s.image, s.ownership, s.gauges, 7);
        (void)compact.plan({0}, s.image->size(), 1000);
        REQUIRE(finds_no_room(*s.image));
        s.image->write(bytes_of(cluster, 7), {300 * cluster});
        REQUIRE_FALSE(s.image->state().refcounts.linked(9));
        s.image->flush();
        REQUIRE(s.image->state().refcounts.linked(9));
        model = read_all(*s.image);
        compact.commit(never);
        CHECK(s.disk->length() < region * cluster);
    }
    compact(s);
    check_compacted(s);
    CHECK((read_all(*s.image) == model));
}

TEST_CASE("C1: behind a tail without refcount blocks nothing is linked before room is short, so that it can go") {
    // With small clusters it takes a long refcount table to reach behind a long tail, and such a table finds no place.
    const Bytes image = lengthened(build_image(with_free_ones()).bytes, 64 * region + 17); // more than the table has
    const bool planned = GENERATE(true, false);
    Scene s(image);
    std::atomic<bool> longer{false};
    s.disk->add_hook(false, [&](const Request &) { longer = longer || s.disk->length() > image.size(); });
    if (planned) {
        const Bytes before = s.disk->bytes();
        Compact compact(*s.image, s.ownership, s.gauges, 7);
        (void)compact.plan({0}, s.image->size(), 1000);
        CHECK((s.disk->bytes() == before)); // a plan changes nothing
    }
    s.image->write(bytes_of(cluster, 7), {300 * cluster});
    s.image->write(Bytes(cluster), {310 * cluster});
    s.image->flush();
    ZeroScan zeroes(*s.image, s.gauges);
    zeroes.run({0}, s.image->size(), never);
    zeroes.commit(never);
    const Bytes model = read_all(*s.image);
    {
        Compact compact(*s.image, s.ownership, s.gauges, 7);
        compact.commit(never); // without a plan, too
        CHECK(s.disk->length() < region * cluster);
    }
    compact(s);
    check_compacted(s);
    CHECK_FALSE(longer);
    CHECK((read_all(*s.image) == model));
}

TEST_CASE("B1: a tail without refcount blocks is not cut beneath a commit that links a block in it") {
    const std::uint64_t length = (300 * region + 17) * cluster; // more than one step
    Scene s(lengthened(build_image(with_free_ones()).bytes, length / cluster));
    Bytes model;
    {
        Compact compacting(*s.image, s.ownership, s.gauges, 7);
        (void)compacting.plan({0}, s.image->size(), 1000);
        Beside flush, commit;
        Breakpoint linking(s.disk, Breakpoint::When::before, [&](const Request &r) {
            return r.op == Op::write && r.at >= 2 * region * cluster; // nothing else is written there
        });
        std::uint64_t cut_to = 0, claimed = 0;
        // Between two steps of the cut somebody wants room, and a flush is about to write the block that gives it.
        commit.start([&] {
            compacting.commit([&] {
                if (cut_to == 0 && s.disk->length() < length) {
                    cut_to = s.disk->length();
                    (void)finds_no_room(*s.image);
                    s.image->write(bytes_of(cluster, 7), {300 * cluster});
                    flush.start([&] { s.image->flush(); });
                    (void)linking.wait();
                    claimed = s.disk->length();
                }
                return false;
            });
        });
        REQUIRE(linking.wait());
        CHECK_FALSE(commit.finished(a_while));
        CHECK(s.disk->length() >= claimed);
        linking.release();
        flush.join();
        commit.join();
        CHECK(cut_to > region * cluster);
        CHECK(s.image->state().refcounts.blocks().size() > 1);
    }
    CHECK(judge(s.disk->bytes()).clean());
    model = read_all(*s.image);
    compact(s);
    check_compacted(s);
    CHECK(s.disk->length() < region * cluster);
    CHECK((read_all(*s.image) == model));
}

TEST_CASE("B1: who needs room behind a tail without refcount blocks gets it, and it is sound at every moment") {
    Scene s(lengthened(build_image(with_free_ones()).bytes, 2 * region + 17));
    const std::uint64_t length = s.disk->length();
    s.guest->write(0, 400 * cluster); // more than the first region has
    s.guest->flush();
    s.guest->write(400 * cluster, 100 * cluster);
    s.guest->flush();
    s.guest->check(0, s.image->size());
    CHECK(s.disk->length() > length);
    CHECK(judge(s.disk->bytes()).sound());
    CHECK(s.cut_everywhere(1, 2) == "");
}

TEST_CASE("C1: where no refcount block is, nothing is cut that an unknown header extension may refer to") {
    ImagePlan plan;
    plan.map(100, 20, 2);
    plan.unknown_extension = 0x12345678;
    const std::uint64_t length = 9 * region + 17;
    Scene s(lengthened(build_image(plan).bytes, length));
    if (GENERATE(true, false))
        link_end(s);
    compact(s);
    CHECK(s.disk->length() >= length * cluster);
    const Bytes left = s.disk->bytes();
    CHECK(std::all_of(left.begin() + 2 * region * cluster, left.begin() + length * cluster,
                      [](std::byte b) { return b == std::byte{0xaa}; }));
}

TEST_CASE("C3: a compaction that is stopped while it cuts what no refcount block describes leaves no leak") {
    ImagePlan plan;
    plan.map(100, 20);
    const std::uint64_t length = 300 * region + 17; // more than one step
    const bool linked = GENERATE(true, false);
    bool cut_in_part = false;
    for (int steps = 0; steps < 200; ++steps) {
        Scene s(lengthened(build_image(plan).bytes, length));
        if (linked)
            link_end(s);
        const Bytes model = read_all(*s.image);
        bool stopped = false;
        {
            Compact compact(*s.image, s.ownership, s.gauges, 7);
            (void)compact.plan({0}, s.image->size(), 1000);
            int asked = 0;
            try {
                compact.commit([&] { return ++asked > steps; });
            } catch (const Error &error) {
                CHECK(error.kind() == Error::Kind::stopped);
                stopped = true;
            }
        }
        s.image->close();
        CHECK((guest_bytes(s.disk->bytes()) == model));
        const auto found = judge(s.disk->bytes());
        CHECK(found.sound());
        if (s.disk->length() < length * cluster) // begun, the leaks of the walk being given back
            CHECK(found.leaks == 0);
        if (!stopped) {
            CHECK(cut_in_part);
            return;
        }
        cut_in_part |= s.disk->length() < length * cluster && s.disk->length() > 2 * region * cluster;
    }
    FAIL("never done");
}

TEST_CASE("C2: moves only go down, below E and from at or above it, and the passes end") {
    Scene s(build_image(metadata_last()).bytes);
    Compact compact(*s.image, s.ownership, s.gauges, 7);
    (void)compact.plan({0}, s.image->size(), 1000);
    const auto ideal = static_cast<std::uint64_t>(s.gauges.ideal_end.load());
    std::atomic<std::uint64_t> wrong{0};
    const int hook = s.disk->add_hook(true, [&](const Request &r) {
        if (r.op == Op::write && r.at + r.length > ideal)
            ++wrong;
    });
    for (const auto &p : compact.plan({0}, s.image->size(), 1000))
        if (p.to_do)
            compact.run(p.at, p.length, never);
    s.disk->remove_hook(hook);
    CHECK(wrong == 0);
    for (const auto &p : compact.plan({0}, s.image->size(), 1000))
        CHECK_FALSE(p.to_do);
    compact.commit(never);
}

TEST_CASE("C2: while E is set the guest's allocations stay below it as long as anything is free there") {
    Scene s(build_image(metadata_last()).bytes);
    Compact compact(*s.image, s.ownership, s.gauges, 7);
    (void)compact.plan({0}, s.image->size(), 1000);
    const std::uint64_t ideal = static_cast<std::uint64_t>(s.gauges.ideal_end.load());
    const std::uint64_t room = s.image->state().allocator.free_below({ideal / cluster});
    REQUIRE(room > 10);
    std::atomic<std::uint64_t> above{0};
    const int hook = s.disk->add_hook(true, [&](const Request &r) { above += r.op == Op::write && r.at >= ideal; });
    for (std::uint64_t i = 0; i < room; ++i)
        s.image->write(bytes_of(cluster, 3), {(i * 3 + 1) * cluster});
    s.disk->remove_hook(hook);
    CHECK(above == 0);
}

TEST_CASE("C2: a CACHE puts its clusters in guest order, whatever goes on in parallel") {
    ImagePlan plan;
    plan.virtual_size = 4 * 64 * cluster;
    for (std::uint64_t c = 0; c < 4 * 64; ++c)
        plan.data[c] = 1500 - c * 4; // backwards
    Scene s(build_image(plan).bytes);
    Compact compact(*s.image, s.ownership, s.gauges, 7);
    (void)compact.plan({0}, s.image->size(), 1000);
    {
        std::vector<std::unique_ptr<Beside>> requests;
        for (std::uint64_t part = 0; part < 4; ++part)
            requests.emplace_back(std::make_unique<Beside>())->start([&, part] {
                compact.run({part * 64 * cluster}, 64 * cluster, never);
            });
        for (auto &request : requests)
            request->join();
    }
    std::uint64_t neighbours = 0, moved = 0;
    for (std::uint64_t part = 0; part < 4; ++part) {
        std::vector<Mapping> mappings(64);
        s.image->state().mapper.survey({part * 64}, mappings);
        const std::uint64_t ideal = static_cast<std::uint64_t>(s.gauges.ideal_end.load()) / cluster;
        for (std::size_t i = 1; i < mappings.size(); ++i)
            if (mappings[i].host.value < ideal && mappings[i].host > mappings[i - 1].host) {
                ++moved;
                neighbours += mappings[i].host == mappings[i - 1].host + 1;
            }
    }
    CHECK(moved > 100);
    CHECK(neighbours * 10 > moved * 7); // there are holes where the old ones lay
}

TEST_CASE("C2: of a long range what lies highest goes first, so much by one request, and neighbours stay neighbours") {
    const auto seed = fresh_seed();
    INFO("QLEAN_SEED=" << seed);
    constexpr std::uint64_t count = 4 * 64, by_request = 20;
    std::vector<std::uint64_t> places(count);
    for (std::uint64_t i = 0; i < count; ++i)
        places[i] = 20 + i * 3;
    std::mt19937_64 random(seed);
    std::shuffle(places.begin(), places.end(), random);
    ImagePlan plan;
    plan.virtual_size = count * cluster;
    for (std::uint64_t c = 0; c < count; ++c)
        plan.data[c] = places[c];
    plan.metadata_at = 2;
    Scene s(build_image(plan).bytes);
    const Bytes disk = read_all(*s.image);
    const auto hosts = [&] {
        std::vector<Mapping> mappings(count);
        for (std::uint64_t c = 0; c < count; c += 64)
            s.image->state().mapper.survey({c}, std::span(mappings).subspan(c, 64));
        std::vector<std::uint64_t> found;
        for (const Mapping &m : mappings)
            found.push_back(m.host.value);
        return found;
    };
    {
        Compact compact(*s.image, s.ownership, s.gauges, 7, by_request * cluster);
        (void)compact.plan({0}, s.image->size(), 1000);
        const auto end = static_cast<std::uint64_t>(s.gauges.ideal_end.load()) / cluster;
        std::uint64_t to_move =
            static_cast<std::uint64_t>(std::count_if(places.begin(), places.end(), [&](auto p) { return p >= end; }));
        REQUIRE(to_move > 5 * by_request);
        for (int request = 0; to_move > by_request; ++request) {
            const auto before = hosts();
            compact.run({0}, s.image->size(), never);
            const auto after = hosts();
            std::uint64_t lowest_moved = ~std::uint64_t{0}, highest_left = 0, n = 0;
            std::map<std::uint64_t, std::uint64_t> moved; // from, to
            for (std::uint64_t c = 0; c < count; ++c)
                if (after[c] != before[c]) {
                    ++n;
                    CHECK(after[c] < end);
                    lowest_moved = std::min(lowest_moved, before[c]);
                    moved[before[c]] = after[c];
                } else {
                    highest_left = std::max(highest_left, after[c]);
                }
            CHECK(n == by_request);
            CHECK(lowest_moved > highest_left);
            std::uint64_t last = 0;
            for (const auto &[from, to] : moved) {
                CHECK(to > last);
                last = to;
            }
            to_move -= n;
            if (request == 1) // a guest that takes what comes free, and a commit in between
                s.image->flush();
        }
    }
    compact(s);
    CHECK(read_all(*s.image) == disk);
    CHECK(judge(s.disk->bytes()).clean());
}

TEST_CASE("C2: one connection moves at a time; the other is told who, and gets it when that one leaves") {
    Scene s(build_image(metadata_last()).bytes);
    auto first = std::make_unique<Compact>(*s.image, s.ownership, s.gauges, 3);
    Compact second(*s.image, s.ownership, s.gauges, 4);
    (void)first->plan({0}, s.image->size(), 1000);
    (void)second.plan({0}, s.image->size(), 1000); // looking is free
    first->run({0}, cluster, never);
    for (const auto &request :
         std::vector<std::function<void()>>{[&] { second.run({0}, cluster, never); }, [&] { second.commit(never); }}) {
        try {
            request();
            FAIL("two connections moved clusters at once");
        } catch (const Error &error) {
            CHECK(error.errno_value() == EPERM);
            CHECK(contains(error.what(), "connection 3"));
        }
    }
    first.reset();
    second.run({0}, cluster, never);
    CHECK(s.ownership.owner()->connection == 4);
}

TEST_CASE("C3: a stop is noticed between clusters, with ESHUTDOWN, and what was done stays sound") {
    Scene s(build_image(metadata_last()).bytes);
    Compact compact(*s.image, s.ownership, s.gauges, 7);
    (void)compact.plan({0}, s.image->size(), 1000);
    int asked = 0;
    const StopCheck stop = [&] { return ++asked > 5; };
    try {
        compact.run({0}, s.image->size(), stop);
        compact.commit(stop);
        FAIL("it did not stop");
    } catch (const Error &error) {
        CHECK(error.kind() == Error::Kind::stopped);
        CHECK(error.errno_value() == ESHUTDOWN);
    }
    CHECK(asked == 6);
    s.guest->check(0, s.image->size());
    s.image->flush();
    CHECK(judge(s.disk->bytes()).sound());
}

TEST_CASE("C3: the walks read around the cache, with what is dirty overlaid") {
    ImagePlan plan;
    plan.virtual_size = 400 * 64 * cluster;
    for (std::uint64_t table = 0; table < 400; ++table)
        plan.data[table * 64] = 8 + table;
    Scene s(build_image(plan).bytes, 4096);
    s.image->write(bytes_of(cluster, 1), {5 * cluster}); // an entry that only memory has
    const auto before = s.image->state().l2.memory_bytes();
    std::vector<Mapping> mappings(400 * 64);
    s.image->state().mapper.survey({0}, mappings);
    CHECK(mappings[5].kind == Mapping::Kind::data);
    CHECK(mappings[399 * 64].kind == Mapping::Kind::data);
    Compact compact(*s.image, s.ownership, s.gauges, 7);
    (void)compact.plan({0}, s.image->size(), 100000);
    CHECK(s.image->state().l2.memory_bytes() <= before + 64 * 1024);
}

TEST_CASE("C9: without a backing file a table of unallocated and zero entries is empty, and goes") {
    ImagePlan plan;
    plan.virtual_size = 4 * 64 * cluster;
    plan.map(64, 10);
    for (std::uint64_t c = 64; c < 4 * 64; ++c)
        plan.zero.push_back(c); // as QEMU trims
    Scene s(build_image(plan).bytes);
    compact(s);
    const Bytes now = s.disk->bytes();
    const auto l1 = load_be<std::uint64_t>(now, 40);
    CHECK(load_be<std::uint64_t>(now, l1) != 0);
    for (std::uint64_t i = 1; i < 4; ++i)
        CHECK(load_be<std::uint64_t>(now, l1 + i * 8) == 0);
    CHECK(judge(now).clean());
    s.guest->check(0, s.image->size());
}

TEST_CASE("C2: what a plan promises can be done, with compressed extents about the end of what is in use") {
    constexpr std::uint64_t size = 4096;
    for (std::uint64_t live = 12; live < 18; ++live)
        for (std::uint64_t extents = 1; extents <= 13; extents += 2)
            for (std::uint64_t holes = 0; holes <= 3; ++holes)
                for (std::uint64_t off = 0; off < 3; ++off) {
                    INFO("up to " << live << ", " << extents << " extents " << off << " clusters behind, " << holes
                                  << " free clusters before");
                    ImagePlan plan;
                    plan.cluster_bits = 12;
                    plan.virtual_size = 64 * size;
                    plan.metadata_at = 1;
                    for (std::uint64_t c = 5; c < live; ++c)
                        if (c % 2 == 0 || c >= 5 + 2 * holes)
                            plan.data[c] = c;
                    for (std::uint64_t i = 0; i < extents; ++i)
                        plan.compressed[40 + i] = 0;
                    plan.compressed_at = live + off;
                    plan.data[60] = 50;
                    Scene s(build_image(plan).bytes);
                    const Bytes model = read_all(*s.image);
                    bool left = true;
                    {
                        Compact compact(*s.image, s.ownership, s.gauges, 7);
                        for (int pass = 0; left && pass < 8; ++pass) {
                            const auto plan = compact.plan({0}, s.image->size(), 1000);
                            left = false;
                            for (const auto &p : plan)
                                if (p.to_do) {
                                    left = true;
                                    compact.run(p.at, p.length, never);
                                }
                            compact.commit(never);
                        }
                    }
                    CHECK_FALSE(left);
                    CHECK(s.gauges.pending == 0);
                    CHECK(s.disk->length() <= (live + 4) * size); // an extent's end is known to the sector
                    CHECK((read_all(*s.image) == model));
                    CHECK(judge(s.disk->bytes()).clean());
                }
}

TEST_CASE("C2: where room for compressed extents comes free bit by bit, none is lost where the bits meet") {
    constexpr std::uint64_t size = 65536, count = 160;
    std::uint64_t needed = 0, taken = 0;
    for (std::uint64_t seed = 1; seed <= 6; ++seed) {
        INFO("seed " << seed);
        std::mt19937_64 random(seed);
        ImagePlan plan;
        plan.cluster_bits = 16;
        plan.virtual_size = count * size;
        plan.metadata_at = 1;
        plan.compressed_at = 8;
        plan.noise = 58000;
        for (std::uint64_t i = 0; i < count; ++i)
            plan.compressed[i] = random() % 40000;
        Scene s(build_image(plan).bytes);
        State &state = s.image->state();
        const Bytes model = read_all(*s.image);
        {
            Compact compact(*s.image, s.ownership, s.gauges, 7);
            for (bool left = true; left;) {
                auto planned = compact.plan({0}, s.image->size(), 1000);
                std::shuffle(planned.begin(), planned.end(), random);
                left = false;
                for (const auto &p : planned)
                    for (std::uint64_t at = 0; p.to_do && at < p.length; at += size) {
                        compact.run(p.at + at, size, never);
                        left = true;
                    }
                compact.commit(never);
            }
        }
        std::vector<Mapping> mappings(count);
        state.mapper.survey({0}, mappings);
        std::uint64_t bytes = 0;
        std::set<std::uint64_t> packs;
        for (const Mapping &m : mappings) {
            REQUIRE(m.kind == Mapping::Kind::compressed);
            const auto extent = entry::compressed_extent(m.bits, plan.cluster_bits);
            Bytes compressed(extent.bytes), whole(size);
            state.file.read(compressed, extent.at);
            const std::uint64_t length =
                compression::decompress(state.compressed.type(), compressed, whole).length.value();
            bytes += length;
            packs.insert(extent.at.value / size);
            packs.insert((extent.at.value + length - 1) / size);
        }
        needed += divide_up(bytes, size);
        taken += packs.size();
        const std::uint64_t length = s.disk->length();
        compact(s);
        CHECK(s.disk->length() <= length);
        CHECK((read_all(*s.image) == model));
        CHECK(judge(s.disk->bytes()).clean());
    }
    INFO(taken << " clusters where " << needed << " would do");
    CHECK(taken * 1000 <= needed * 1030);
}

TEST_CASE("A clean end leaves no leak while extents are being packed for somebody who is still connected") {
    constexpr std::uint64_t size = 65536, count = 64;
    ImagePlan plan;
    plan.cluster_bits = 16;
    plan.virtual_size = count * size;
    plan.metadata_at = 1;
    plan.compressed_at = 8;
    for (std::uint64_t i = 0; i < count; ++i)
        plan.compressed[i] = 40000;
    Scene s(build_image(plan).bytes);
    std::optional<Compact> compact(std::in_place, *s.image, s.ownership, s.gauges, 7);
    REQUIRE(compact->plan({0}, s.image->size(), 1000).size() > 0);
    compact->run({0}, 4 * size, never);
    SECTION("after a commit") { compact->commit(never); }
    SECTION("at once") {}
    s.guest->write(5 * size + 77, 3000); // a cluster of its own, durable before the end begins
    s.guest->flush();
    const std::size_t ending = PowerCuts(*s.disk).moments();
    s.image->close();
    CHECK(judge(s.disk->bytes()).clean());
    CHECK((guest_bytes(s.disk->bytes()) == s.guest->now()));
    compact.reset(); // its connection, which ends after the image did
    CHECK(s.cut_everywhere(1, 6, ending) == "");
}
