// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The rules of moving metadata (A4), of distrusting refcounts (A5), and of compaction as a whole (C1, C2, C3).
#include "lib/byte_order.h"
#include "tests/fault/scene.h"

#include <thread>

using namespace qlean;
using namespace qlean::fault;

namespace {

constexpr std::uint64_t cluster = 512;

/// 512-byte clusters, data at the start with holes in it, all metadata far behind it: everything has to move.
ImagePlan metadata_last() {
    ImagePlan plan;
    plan.virtual_size = 4 * 64 * cluster;
    for (std::uint64_t c = 0; c < 4 * 64; c += 3)
        plan.data[c] = 10 + c;
    plan.metadata_at = 600;
    return plan;
}

/// Compacts until nothing is left to do.
void compact(Scene &s, const std::function<void()> &between = {}) {
    Compact compact(*s.image, s.ownership, s.gauges, 7);
    for (int pass = 0; pass < 4; ++pass) {
        const auto plan = compact.plan({0}, s.image->size(), 100000);
        for (const auto &p : plan)
            if (p.to_do)
                compact.run(p.at, p.length, never);
        if (between)
            between();
        compact.commit(never);
        if (std::none_of(plan.begin(), plan.end(), [](const auto &p) { return p.to_do; }) && s.gauges.pending == 0)
            return;
    }
}

std::string error_of(const std::function<void()> &f) {
    try {
        f();
    } catch (const Error &error) {
        return error.what();
    }
    return {};
}

bool contains(const std::string &text, const std::string &part) { return text.find(part) != std::string::npos; }

/// Takes every free cluster and fills it.
void use_what_is_free(Scene &s) {
    for (std::uint64_t c = 1; c < 4 * 64; c += 3)
        s.image->write(bytes_of(cluster, 0xff), {c * cluster});
}

} // namespace

TEST_CASE("A4a: a table does not move while a miss reads it") {
    const BuiltImage built = build_image(metadata_last());
    Scene s(built.bytes, 4096);
    auto cold = open_image(s.disk, true); // only to know what must be read
    const Bytes expected = read_some(*cold, 3 * 64 * cluster, cluster);
    // The walk of compaction passes by the cache, so table 3 is still to be loaded.
    s.image.reset();
    s.image = open_image(s.disk);
    Compact compact(*s.image, s.ownership, s.gauges, 7);
    (void)compact.plan({0}, s.image->size(), 1000);
    Beside read, move;
    Bytes got;
    std::string error;
    std::thread::id reader;
    Breakpoint loading(s.disk, Breakpoint::When::before,
                       [&, touch = touches(Op::read, built.l2_tables.at(3), cluster)](const Request &r) {
                           return touch(r) && std::this_thread::get_id() == reader;
                       });
    read.start([&] {
        reader = std::this_thread::get_id();
        error = error_of([&] { got = read_some(*s.image, 3 * 64 * cluster, cluster); });
    });
    REQUIRE(loading.wait());
    move.start([&] {
        compact.run({0}, s.image->size(), never);
        compact.commit(never);
        use_what_is_free(s); // whatever was given back holds something else now
        s.image->flush();
    });
    (void)move.finished(std::chrono::milliseconds(500));
    loading.release();
    read.join();
    move.join();
    CHECK(error == "");
    CHECK((got == expected));
}

TEST_CASE("A4b: a table does not move while a slice of it is being written back") {
    const BuiltImage built = build_image(metadata_last());
    Scene s(built.bytes);
    Compact compact(*s.image, s.ownership, s.gauges, 7);
    (void)compact.plan({0}, s.image->size(), 1000);
    s.guest->write((3 * 64 + 1) * cluster, cluster); // a new entry in table 3
    Beside flush, move;
    Breakpoint writing(s.disk, Breakpoint::When::before, touches(Op::write, built.l2_tables.at(3), cluster));
    flush.start([&] { s.image->flush(); });
    REQUIRE(writing.wait());
    move.start([&] {
        compact.run({0}, s.image->size(), never);
        compact.commit(never);
        for (std::uint64_t c = 1; c < 4 * 64; c += 3)
            s.guest->write(c * cluster, cluster);
        s.guest->flush();
    });
    CHECK_FALSE(move.finished(a_while));
    writing.release();
    flush.join();
    move.join();
    s.guest->check(0, s.image->size());
    CHECK(judge(s.disk->bytes()).sound());
    CHECK((guest_bytes(s.disk->bytes()) == s.guest->now()));
}

TEST_CASE("A4c, A4f: every power cut during the moves of L1, refcount table, blocks and L2 tables, beside a guest") {
    const std::uint64_t seed = fresh_seed();
    INFO("QLEAN_SEED=" << seed);
    for (int round = 0; round < 4; ++round) {
        ImagePlan plan = metadata_last();
        plan.table_clusters = 1 + round % 2;
        plan.metadata_at = 600 + 150 * round;
        Scene s(build_image(plan).bytes);
        std::mt19937_64 random(seed + round);
        compact(s, [&] {
            s.guest->trim(random() % 200 * cluster, 20 * cluster); // unlinks in tables that move
            s.guest->write(random() % 200 * cluster, 10 * cluster);
        });
        s.guest->flush();
        CHECK(s.gauges.pending == 0);
        CHECK(s.cut_everywhere(seed, 8) == "");
    }
}

TEST_CASE("A4d: a table that is found empty and given back does not take a write under way with it") {
    ImagePlan plan;
    plan.virtual_size = 4 * 64 * cluster;
    for (std::uint64_t c = 0; c < 64; ++c)
        plan.data[c] = 10 + c;
    plan.zero = {3 * 64 + 5}; // a table of nothing
    const BuiltImage built = build_image(plan);
    Scene s(built.bytes);
    Compact compact(*s.image, s.ownership, s.gauges, 7);
    (void)compact.plan({0}, s.image->size(), 1000);
    Beside write, commit;
    const std::uint64_t end = s.disk->length();
    // The guest's data is on its way, its entry not stored yet.
    Breakpoint writing(s.disk, Breakpoint::When::before, [=](const Request &r) {
        return r.op == Op::write && r.length == 3 * cluster && (r.at >= 10 * cluster || r.at < end);
    });
    write.start([&] { s.guest->write((3 * 64 + 7) * cluster, 3 * cluster); });
    REQUIRE(writing.wait());
    commit.start([&] { compact.commit(never); });
    (void)commit.finished(a_while);
    writing.release();
    write.join();
    commit.join();
    s.guest->check(0, s.image->size());
    s.guest->flush();
    s.image.reset();
    CHECK(judge(s.disk->bytes()).sound());
    CHECK((guest_bytes(s.disk->bytes()) == s.guest->now()));
}

TEST_CASE("A4e: a table that moves is written whole before it is linked") {
    // 8 KiB clusters: one dirty slice out of two, and a new home that held a guest's bytes.
    ImagePlan plan;
    plan.cluster_bits = 13;
    plan.virtual_size = 8 * 1024 * 1024;
    for (std::uint64_t c = 0; c < 8; ++c)
        plan.data[c * 100] = 10 + c;
    plan.metadata_at = 40;
    const BuiltImage built = build_image(plan);
    Scene s(built.bytes);
    s.disk->refuse_punch(true);
    s.guest->trim(0, 8192); // host cluster 10 is free and holds bytes
    s.guest->flush();
    compact(s);
    s.guest->write(8192, 100);
    s.guest->flush();
    s.image.reset();
    const Bytes left = s.disk->bytes();
    CHECK(judge(left).sound());
    CHECK((guest_bytes(left) == s.guest->now()));
}

TEST_CASE("A5: with fewer refcounts than references nothing is moved, and 'check' is named") {
    BuiltImage built = build_image(metadata_last());
    store_be<std::uint16_t>(built.bytes, built.refcount_at(10 + 3 * 80), 0); // of the last data cluster but a few
    Scene s(built.bytes, 64 * 1024, false);
    Compact compact(*s.image, s.ownership, s.gauges, 7);
    const std::string error = error_of([&] { (void)compact.plan({0}, s.image->size(), 1000); });
    CHECK(contains(error, "qemu-img check"));
    CHECK(contains(error, "250"));
    CHECK(error_of([&] { compact.run({0}, s.image->size(), never); }) != "");
    CHECK(error_of([&] { compact.commit(never); }) != "");
    CHECK(s.gauges.moved_bytes == 0);
    const Bytes now = s.disk->bytes();
    CHECK(now.size() >= built.bytes.size());
    CHECK(std::equal(now.begin() + 5 * cluster, now.begin() + 400 * cluster, built.bytes.begin() + 5 * cluster));
}

TEST_CASE("A5: a clean shutdown does not cut off a cluster whose refcount is wrong") {
    ImagePlan plan;
    plan.virtual_size = 64 * cluster;
    for (std::uint64_t c = 0; c < 40; ++c)
        plan.data[c] = 200 + c; // enough is free below to link refcount blocks ahead
    plan.metadata_at = 1;
    BuiltImage built = build_image(plan);
    store_be<std::uint16_t>(built.bytes, built.refcount_at(239), 0); // the last cluster of the file
    Scene s(built.bytes, 64 * 1024, false);
    const Bytes expected = read_some(*s.image, 39 * cluster, cluster);
    s.image->write(bytes_of(10, 1), {0}); // so that there is something to end cleanly
    s.image->state().allocator.load_all();
    s.image->close();
    CHECK(s.disk->length() >= 240 * cluster);
    auto again = open_image(std::make_shared<FaultyDisk>(s.disk->bytes()), true);
    CHECK((read_some(*again, 39 * cluster, cluster) == expected));
}

TEST_CASE(
    "A5: clusters that only an unknown header extension may refer to are pinned: not moved, not freed, not cut off") {
    ImagePlan plan = metadata_last();
    plan.leaked = {300, 901, 902};
    plan.unknown_extension = 0x12345678;
    BuiltImage built = build_image(plan);
    for (const std::uint64_t c : plan.leaked)
        std::fill_n(built.bytes.begin() + static_cast<std::ptrdiff_t>(c * cluster), cluster, std::byte{0xab});
    Scene s(built.bytes);
    compact(s);
    const Bytes now = s.disk->bytes();
    REQUIRE(now.size() >= 903 * cluster);
    for (const std::uint64_t c : plan.leaked)
        CHECK(all_are(Bytes(now.begin() + static_cast<std::ptrdiff_t>(c * cluster),
                            now.begin() + static_cast<std::ptrdiff_t>((c + 1) * cluster)),
                      0xab));
    CHECK(s.gauges.pinned == 3);
    CHECK(judge(now).leaks == 3);
    CHECK(judge(now).sound());
}

TEST_CASE("A5: without one, leaked clusters are given back; one with two refcounts is pinned") {
    ImagePlan plan = metadata_last();
    plan.leaked = {300, 901, 902, 903};
    BuiltImage built = build_image(plan);
    store_be<std::uint16_t>(built.bytes, built.refcount_at(300), 2);
    Scene s(built.bytes);
    compact(s);
    CHECK(s.gauges.pinned == 1);
    const Bytes now = s.disk->bytes();
    CHECK(judge(now).text() == "1 leaked clusters");
    CHECK(now.size() < 900 * cluster);
}

TEST_CASE("A5: leaks that another connection gave back, and the guest uses by now, are left alone") {
    ImagePlan plan = metadata_last();
    plan.leaked = {300, 301, 302, 303};
    Scene s(build_image(plan).bytes);
    Compact late(*s.image, s.ownership, s.gauges, 1);
    (void)late.plan({0}, s.image->size(), 1000); // it has seen the leaks, and waits
    {
        Compact early(*s.image, s.ownership, s.gauges, 2);
        (void)early.plan({0}, s.image->size(), 1000);
        early.commit(never);
    }
    use_what_is_free(s);
    s.image->flush();
    late.commit(never);
    s.image->flush();
    CHECK(judge(s.disk->bytes()).sound());
    for (std::uint64_t c = 1; c < 4 * 64; c += 3)
        REQUIRE(all_are(read_some(*s.image, c * cluster, cluster), 0xff));
}

TEST_CASE(
    "A5: a walk beside the guest does not take what another connection reserved, or the guest allocated, for leaks") {
    // Metadata first, so that the mover has no tables to move and leads no commit when it stops.
    ImagePlan plan = metadata_last();
    plan.metadata_at = 1;
    for (auto &[guest, host] : plan.data)
        host = 20 + 4 * guest;
    Scene s(build_image(plan).bytes);
    Compact mover(*s.image, s.ownership, s.gauges, 1);
    (void)mover.plan({0}, s.image->size(), 1000);
    Compact looker(*s.image, s.ownership, s.gauges, 2);
    // The mover has reserved its destinations and is between two clusters.
    int asked = 0;
    mover.run({0}, s.image->size(), [&] {
        if (++asked == 3)
            (void)looker.plan({0}, s.image->size(), 1000);
        return false;
    });
    REQUIRE(asked > 10);
    mover.commit(never);
    s.ownership.release(1);
    looker.commit(never);
    use_what_is_free(s);
    s.image->flush();
    s.guest.reset();
    CHECK(judge(s.disk->bytes()).sound());
    const Bytes disk = read_all(*s.image);
    for (std::uint64_t at = 0; at < disk.size(); ++at)
        if (at / cluster % 3 == 0 && disk[at] != filled(at))
            FAIL("byte " << at << " is lost");
}

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
    CHECK(s.gauges.pending == 0);
    Compact again(*s.image, s.ownership, s.gauges, 8);
    for (const auto &p : again.plan({0}, s.image->size(), 1000))
        CHECK_FALSE(p.to_do);
    CHECK(judge(s.disk->bytes()).clean());
    CHECK(s.disk->length() == static_cast<std::uint64_t>(s.gauges.ideal_end.load()));
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
    for (std::uint64_t c = 0; c < 64; ++c)
        plan.data[c] = 10 + c;
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
