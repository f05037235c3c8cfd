// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The rules of moving metadata (A4) and of distrusting refcounts (A5).
#include "lib/byte_order.h"
#include "lib/check/check.h"
#include "lib/compact/relocator.h"
#include "tests/fault/scene_moves.h"

#include <set>
#include <thread>

using namespace qlean;
using namespace qlean::fault;

namespace {

/// Calls before a move takes its lock.
class WatchedFile final : public FaultyFile {
  public:
    WatchedFile(std::shared_ptr<FaultyDisk> disk, std::function<void()> &call)
        : FaultyFile(std::move(disk)), call_(call) {}
    void prepare_to_share(HostOffset, std::uint64_t) override {
        if (const auto call = std::exchange(call_, nullptr))
            call();
    }

  private:
    std::function<void()> &call_;
};

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
    plan.map(64, 10);
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

TEST_CASE("A4: the guard follows what moves: every new home is guarded, no old one") {
    ImagePlan plan = metadata_last();
    plan.table_clusters = 2;
    Scene s(build_image(plan).bytes);
    State &state = s.image->state();
    using Homes = std::map<std::string, std::set<std::uint64_t>>;
    const auto homes = [&] {
        Homes found;
        const auto add = [&](const char *kind, std::uint64_t first, std::uint64_t count) {
            for (std::uint64_t c = 0; c < count; ++c)
                found[kind].insert(first + c);
        };
        add("L1", state.l1.home().value / cluster, divide_up(state.l1.size() * 8, cluster));
        for (std::uint64_t i = 0; i < state.l1.size(); ++i)
            add("L2", state.l1.table(i).value / cluster, 1);
        add("refcount table", state.refcounts.home().value / cluster, state.refcounts.table_clusters());
        for (const auto &[region, block] : state.refcounts.blocks())
            add("refcount blocks", block.value, 1);
        return found;
    };
    const Homes before = homes();
    compact(s);
    const Homes after = homes();
    std::set<std::uint64_t> all;
    for (const auto &[kind, clusters] : after) {
        INFO(kind);
        CHECK(clusters != before.at(kind));
        for (const std::uint64_t c : clusters)
            CHECK(state.guard.has({c}));
        all.insert(clusters.begin(), clusters.end());
    }
    for (const auto &[kind, clusters] : before)
        for (const std::uint64_t c : clusters) {
            INFO(kind << " was in cluster " << c);
            CHECK((all.contains(c) || !state.guard.has({c})));
        }
    CHECK(judge(s.disk->bytes()).clean());
}

TEST_CASE("A4: between a move and its commit a snapshot's entries say where the clusters are now") {
    ImagePlan plan;
    plan.virtual_size = 128 * cluster;
    plan.map_all(200, 2);
    const Bytes image = with_snapshot(build_image(plan).bytes, "one");
    for (const bool own_table : {false, true}) { // or one that the active image shares
        INFO((own_table ? "with a table of its own" : "with the active image's table"));
        Scene s(image);
        State &state = s.image->state();
        if (own_table) {
            s.guest->write(5 * cluster, cluster);
            s.guest->flush();
        }
        const SnapshotPointer snapshot = state.snapshots.list().at(0);
        std::vector<Mapping> before(128), now(128), active(128);
        state.mapper.survey(*snapshot, {0}, before);
        Compact compact(*s.image, s.ownership, s.gauges, 7);
        (void)compact.plan({0}, s.image->size(), 1000);
        compact.run({0}, s.image->size(), never);
        REQUIRE(state.snapshots.pending.any());
        state.mapper.survey(*snapshot, {0}, now);
        state.mapper.resolve({0}, active);
        std::uint64_t moved = 0;
        for (std::uint64_t c = 0; c < 128; ++c) {
            if (own_table && c == 5)
                continue;
            CHECK(now[c].host == active[c].host);
            moved += now[c].host != before[c].host;
        }
        CHECK(moved > 60);
        compact.commit(never);
        CHECK((snapshot_disks(s.disk->bytes()) == snapshot_disks(image)));
    }
}

TEST_CASE("A7: a place that a failed move has written to is not taken for zeroes by the next move") {
    const Op op = GENERATE(Op::write, Op::share);
    constexpr std::uint64_t low = 0, moved = 30, zero = 33;
    ImagePlan plan = metadata_last();
    Scene s(build_image(plan).bytes);
    State &state = s.image->state();
    s.image->write(bytes_of(cluster, 0), {zero * cluster}); // in place: data, all of it zeroes
    s.image->trim({low * cluster}, cluster);
    s.image->give_back(); // punched
    auto room = state.allocator.reserve_below(1, {11});
    REQUIRE(room.count() == 1);
    REQUIRE(room.extents().front().zero);
    s.disk->allow_share(op == Op::share);
    Fault fault;
    fault.ops = mask(op);
    fault.code = ENOSPC;
    fault.partial = cluster;
    s.disk->fail(fault);
    const auto source = [&](std::uint64_t c) {
        Mapping m;
        state.mapper.resolve({c}, std::span(&m, 1));
        return m.host;
    };
    // The first attempt fails, the second finds that the guest has trimmed what was to be moved.
    const auto trim = [&] { s.image->trim({moved * cluster}, cluster); };
    CHECK_FALSE(relocate_into(state, {moved}, source(moved), room, trim));
    REQUIRE(s.disk->struck());
    s.disk->allow_share(false); // or the next would not care
    REQUIRE(relocate_into(state, {zero}, source(zero), room, [] {}));
    CHECK(all_are(read_some(*s.image, zero * cluster, cluster), 0));
    s.image->flush();
    CHECK(all_are(read_some(*s.image, moved * cluster, cluster), 0));
    CHECK(judge(s.disk->bytes()).sound());
}

TEST_CASE(
    "A move looks again when it holds the cluster: what the guest has moved or given up since is not its business") {
    constexpr std::uint64_t low = 0, moved = 30;
    const std::string what = GENERATE(as<std::string>{}, "rewritten", "given up", "its place is used again");
    INFO(what);
    const auto disk = std::make_shared<FaultyDisk>(build_image(metadata_last()).bytes);
    std::function<void()> before_lock;
    const auto image = Image::open(std::make_unique<WatchedFile>(disk, before_lock), {});
    State &state = image->state();
    for (std::uint64_t c = 1; c < 4 * 64; c += 3) // with them, nothing is free below what has to move
        image->write(bytes_of(2 * cluster, 0xff), {c * cluster});
    image->trim({low * cluster}, cluster);
    image->give_back();
    auto room = state.allocator.reserve_below(1, {11});
    REQUIRE(room.count() == 1);
    const auto place = [&](std::uint64_t c) {
        Mapping m;
        state.mapper.resolve({c}, std::span(&m, 1));
        return m.host;
    };
    const HostCluster source = place(moved);
    Bytes model = read_all(*image);
    const auto set = [&](std::uint64_t c, unsigned value) {
        std::fill_n(model.begin() + static_cast<std::ptrdiff_t>(c * cluster), cluster, std::byte(value));
        return bytes_of(cluster, value);
    };
    before_lock = [&] {
        image->trim({moved * cluster}, cluster);
        set(moved, 0);
        if (what == "rewritten")
            image->write(set(moved, 9), {moved * cluster});
        if (what != "its place is used again")
            return;
        image->give_back();
        image->write(set(low, 7), {low * cluster});
        REQUIRE(place(low) == source);
    };
    CHECK_FALSE(relocate_into(state, {moved}, source, room, [] {}));
    room = {};
    CHECK((read_all(*image) == model));
    image->close();
    CHECK((guest_bytes(disk->bytes()) == model));
    CHECK(judge(disk->bytes()).clean());
}

TEST_CASE("What the guest is writing is not moved meanwhile, whether or not a snapshot has it too") {
    constexpr std::uint64_t busy = 150; // refcount blocks have taken the lowest places
    const bool shared = GENERATE(false, true);
    Bytes before = build_image(metadata_last()).bytes;
    if (shared)
        before = with_snapshot(before, "a");
    Scene s(before);
    State &state = s.image->state();
    s.image->write(bytes_of(cluster, 1), {(busy + 1) * cluster}); // the table is the disk's own
    s.image->flush();
    Bytes model = read_all(*s.image);
    auto room = state.allocator.reserve_below(1, {10 + busy});
    REQUIRE(room.count() == 1);
    Mapping m;
    state.mapper.resolve({busy}, std::span(&m, 1));
    Beside guest;
    Breakpoint writing(s.disk, Breakpoint::When::before,
                       [first = std::make_shared<std::atomic<bool>>(true)](const Request &r) {
                           return r.op == Op::write && first->exchange(false);
                       });
    guest.start([&] { s.image->write(bytes_of(100, 9), {busy * cluster + 7}); });
    REQUIRE(writing.wait());
    CHECK_FALSE(relocate_into(state, {busy}, m.host, room, [] {}));
    writing.release();
    guest.join();
    std::fill_n(model.begin() + busy * cluster + 7, 100, std::byte{9});
    room = {};
    CHECK((read_all(*s.image) == model));
    s.image->close();
    CHECK((guest_bytes(s.disk->bytes()) == model));
    CHECK((snapshot_disks(s.disk->bytes()) == snapshot_disks(before)));
    CHECK(judge(s.disk->bytes()).clean());
}

TEST_CASE("A move shares the host's blocks where the host can: nothing is read, nothing written, cold or not") {
    const bool cold = GENERATE(false, true);
    Scene s(build_image(metadata_last()).bytes);
    State &state = s.image->state();
    s.guest->trim(0, cluster);
    s.image->give_back();
    auto room = state.allocator.reserve_below(1, {11});
    REQUIRE(room.count() == 1);
    const Bytes before = read_some(*s.image, 30 * cluster, cluster);
    Mapping m;
    state.mapper.resolve({30}, std::span(&m, 1));
    s.disk->allow_share(true);
    s.disk->start_cold(cold);
    const std::uint64_t used = s.disk->count(mask(Op::read) | mask(Op::write)), shared = s.disk->count(mask(Op::share));
    REQUIRE(relocate_into(state, {30}, m.host, room, [] {}));
    CHECK(s.disk->count(mask(Op::read) | mask(Op::write)) == used);
    CHECK(s.disk->count(mask(Op::share)) == shared + 1);
    CHECK(read_some(*s.image, 30 * cluster, cluster) == before);
    s.guest->flush();
    CHECK(s.cut_everywhere(11) == "");
    CHECK(judge(s.disk->bytes()).sound());
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
    plan.map(40, 200); // enough is free below to link refcount blocks ahead
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

TEST_CASE("A5: without one, leaked clusters are given back, whatever their refcounts") {
    ImagePlan plan = metadata_last();
    plan.leaked = {300, 901, 902, 903};
    BuiltImage built = build_image(plan);
    // As many as a crash leaves of packs with many extents, or of what many snapshots share.
    store_be<std::uint16_t>(built.bytes, built.refcount_at(300), 65535);
    store_be<std::uint16_t>(built.bytes, built.refcount_at(901), 65535);
    const bool by_check = GENERATE(false, true);
    if (!by_check) // one that is in use, which a check leaves: its entries' flags rely on the count
        store_be<std::uint16_t>(built.bytes, built.refcount_at(plan.data.at(30)), 1000);
    Scene s(built.bytes);
    if (by_check) {
        const CheckReport report = check_image(s.image->state(), Repair::leaks, never);
        CHECK(report.leaks_fixed == 4);
        CHECK(report.leaks == 0);
    }
    compact(s);
    CHECK(s.gauges.pinned == 0);
    const Bytes now = s.disk->bytes();
    CHECK(judge(now).clean());
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

namespace {

/// A guest that unlinks a cluster of table 3 when `walk` has come to table 2, and is kept from running on until that
/// has ended, or a while has passed. True: the walk did not wait.
bool unlinks_during(Scene &s, const BuiltImage &built, const std::function<void()> &walk) {
    State &state = s.image->state();
    Beside walking, guest;
    Breakpoint reading(s.disk, Breakpoint::When::before, touches(Op::read, built.l2_tables.at(2), cluster));
    walking.start(walk);
    REQUIRE(reading.wait());
    bool ended = false;
    std::promise<void> unlinked;
    guest.start([&] {
        const GuestCluster c{3 * 64};
        const RangeLock::Exclusive range(state.ranges, state.geometry.offset_of(c), 1);
        std::optional<Mapping> was;
        {
            Mapper::Editor editor(state.mapper, c, 1);
            was = editor.get(c);
            editor.set_zero(c);
        }
        unlinked.set_value();
        ended = walking.finished(a_while);
        state.allocator.retire({{was->host, 1}});
    });
    unlinked.get_future().wait();
    reading.release();
    guest.join();
    walking.join();
    return ended;
}

} // namespace

TEST_CASE("A5: what the guest has unlinked and not retired yet is no leak to a walk beside it") {
    const BuiltImage built = build_image(metadata_last());
    Scene s(built.bytes);
    s.image.reset();
    s.image = open_image(s.disk); // nothing of it in memory, so that the walk reads the tables
    Bytes expected = guest_bytes(built.bytes);
    const auto fill = [&](std::uint64_t c, int value) {
        std::fill_n(expected.begin() + static_cast<std::ptrdiff_t>(c * cluster), cluster,
                    static_cast<std::byte>(value));
    };
    fill(3 * 64, 0);
    for (std::uint64_t c = 1; c < 4 * 64; c += 3)
        fill(c, 0xff);
    const auto reuse = [&] { // what was given back, far from the range that is held
        s.image->state().write_back.commit(WriteBack::Give::back);
        for (std::uint64_t c = 1; c < 100; c += 3)
            s.image->write(bytes_of(cluster, 0xff), {c * cluster});
        s.image->flush();
    };
    SECTION("of a compaction") {
        CHECK_FALSE(unlinks_during(s, built, [&] {
            Compact compact(*s.image, s.ownership, s.gauges, 1);
            (void)compact.plan({0}, s.image->size(), 1000);
            compact.run({0}, cluster, never);
            reuse();
        }));
    }
    SECTION("of a check") {
        CheckReport report;
        CHECK_FALSE(unlinks_during(s, built, [&] {
            report = check_image(s.image->state(), Repair::leaks, never);
            reuse();
        }));
        CHECK(report.leaks + report.leaks_fixed == 0);
    }
    s.image->flush();
    s.image->state().write_back.commit(WriteBack::Give::back);
    use_what_is_free(s);
    s.image->flush();
    CHECK((read_some(*s.image, 0, s.image->size()) == expected));
    CHECK(judge(s.disk->bytes()).clean());
}

TEST_CASE("A5: an entry that a walk saw before it moved, and judges after the file was cut, is not called damaged") {
    ImagePlan plan = metadata_last();
    plan.metadata_at = 1;
    for (auto &[guest, host] : plan.data)
        host = 300 + guest;
    const BuiltImage built = build_image(plan);
    Scene s(built.bytes);
    s.image.reset();
    s.image = open_image(s.disk); // nothing in memory, so that the walk reads the tables
    Beside looking;
    Breakpoint read(s.disk, Breakpoint::When::after, touches(Op::read, built.l2_tables.at(3), cluster));
    std::string error;
    looking.start([&] {
        Compact idle(*s.image, s.ownership, s.gauges, 2);
        error = error_of([&] { (void)idle.plan({0}, s.image->size(), 1000); });
    });
    REQUIRE(read.wait());
    compact(s);
    REQUIRE(s.disk->length() < (300 + 3 * 64) * cluster);
    read.release();
    looking.join();
    CHECK(error == "");
    CHECK((read_some(*s.image, 0, s.image->size()) == guest_bytes(built.bytes)));
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
