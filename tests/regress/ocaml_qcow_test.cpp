// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Bugs of mirage/ocaml-qcow, the online compactor inside Docker for Mac: races between the parts that move, erase,
// shrink and flush. Each is stopped at the point at which data was lost there.
#include "tests/regress/rig.h"

#include "lib/byte_order.h"

using namespace qlean;
using namespace qlean::fault;

namespace {

constexpr std::uint64_t cluster = 4096;

/// 64 clusters of the guest: 0…15 low in the file, 16…47 far away, the rest unallocated. Locks cover 16 clusters.
ImagePlan half_far_away() {
    ImagePlan plan;
    plan.cluster_bits = 12;
    plan.virtual_size = 256 * cluster;
    plan.metadata_at = 4;
    for (std::uint64_t c = 0; c < 48; ++c)
        plan.data[c] = (c < 16 ? 20 : 100) + c;
    return plan;
}

/// The data is where it should be; all tables are far away.
ImagePlan tables_far_away() {
    ImagePlan plan;
    plan.cluster_bits = 12;
    plan.virtual_size = 256 * cluster;
    plan.metadata_at = 300;
    return plan.map(48, 1);
}

bool any_overlaps(const std::vector<Request> &requests, std::uint64_t at, std::uint64_t length) {
    return std::any_of(requests.begin(), requests.end(),
                       [&](const Request &r) { return overlap(r.at, r.length, at, length); });
}

} // namespace

TEST_CASE("ocaml-qcow#82: a cluster that the eraser is about to punch is not where the compactor moves something") {
    Rig rig(build_image(half_far_away()).bytes);
    PunchGuard guard(rig.disk);
    rig.trim(0, 16 * cluster);
    const auto compact = rig.connect();
    Beside eraser;
    Requests punches(rig.disk, is(Op::punch));
    Breakpoint in_punch(rig.disk, Breakpoint::When::before, is(Op::punch));
    eraser.start([&] { rig.image->give_back(); });
    REQUIRE(in_punch.wait());
    const Request pending = punches.seen().front();
    CHECK(pending.length >= cluster);
    {
        Requests writes(rig.disk, is(Op::write));
        run_plan(*compact, rig.image->size());
        compact->commit(go_on);
        CHECK(!writes.seen().empty());
        CHECK_FALSE(any_overlaps(writes.seen(), pending.at, pending.length));
        CHECK(rig.disk->length() >= pending.at + pending.length);
    }
    CHECK_FALSE(eraser.finished());
    in_punch.release();
    eraser.join();
    CHECK(rig.reads_right());
    run_plan(*compact, rig.image->size());
    compact->commit(go_on);
    CHECK(guard.text() == "");
    rig.finish();
}

TEST_CASE("ocaml-qcow#82: the eraser does not punch or cut off where the compactor is about to move something") {
    Rig rig(build_image(half_far_away()).bytes);
    rig.trim(0, 8 * cluster);
    rig.image->give_back();
    const auto compact = rig.connect();
    compact->plan({0}, rig.image->size(), all_of_it);
    Beside mover;
    Requests copies(rig.disk, is(Op::write));
    Breakpoint in_move(rig.disk, Breakpoint::When::before, is(Op::write));
    mover.start([&] { compact->run({0}, rig.image->size(), go_on); });
    REQUIRE(in_move.wait());
    const Request copy = copies.seen().front();
    Requests punches(rig.disk, is(Op::punch));
    rig.trim(40 * cluster, 8 * cluster);
    rig.trim(192 * cluster, 16 * cluster);
    rig.image->give_back();
    compact->commit(go_on); // a FLUSH beside the CACHE
    rig.image->give_back();
    CHECK(!punches.seen().empty());
    CHECK_FALSE(any_overlaps(punches.seen(), copy.at, copy.length));
    CHECK(rig.disk->length() >= copy.at + copy.length);
    CHECK_FALSE(mover.finished());
    in_move.release();
    mover.join();
    compact->commit(go_on);
    rig.finish();
}

TEST_CASE("ocaml-qcow#82: what one compactor has reserved is not taken for a leak and erased by another") {
    Rig rig(build_image(half_far_away()).bytes);
    rig.disk->start_cold(true); // the first read of each cluster is made with no lock held
    auto first = rig.connect(1), second = rig.connect(2);
    first->plan({0}, rig.image->size(), all_of_it);
    Beside mover;
    Breakpoint between_moves(rig.disk, Breakpoint::When::before, touches(Op::read, rig.host_of(20), cluster));
    mover.start([&] { first->run({0}, rig.image->size(), go_on); });
    REQUIRE(between_moves.wait());
    second->plan({0}, rig.image->size(), all_of_it); // commits, walks, finds counts without referrers
    CHECK(said([&] { second->run({0}, rig.image->size(), go_on); }).find("connection 1") != std::string::npos);
    between_moves.release();
    mover.join();
    first->commit(go_on);
    first.reset();
    second->commit(go_on);
    rig.write(64 * cluster, 100 * cluster, 7); // would be given what is in use
    CHECK(rig.reads_right());
    second->commit(go_on);
    second.reset();
    rig.finish();
}

TEST_CASE("ocaml-qcow#77: an L2 table does not move while a writer reads it to change it") {
    Rig rig(build_image(tables_far_away()).bytes);
    const auto compact = rig.connect();
    compact->plan({0}, rig.image->size(), all_of_it);
    const std::uint64_t home = rig.l2_home(0);
    Beside guest, mover;
    Breakpoint in_table(rig.disk, Breakpoint::When::before, touches(Op::read, home, cluster));
    guest.start([&] { rig.write(3 * cluster + 10, 6 * cluster, 33); });
    REQUIRE(in_table.wait());
    mover.start([&] {
        run_plan(*compact, rig.image->size());
        compact->commit(go_on); // gives the old home back, punches it, cuts it off
        rig.image->give_back();
    });
    CHECK_FALSE(mover.finished(a_while));
    in_table.release();
    guest.join();
    mover.join();
    CHECK(rig.l2_home(0) < home);
    CHECK(rig.reads_right());
    rig.finish();
}

TEST_CASE("ocaml-qcow#77: an entry that is written while its L2 table moves is in the new table") {
    Rig rig(build_image(tables_far_away()).bytes);
    const auto compact = rig.connect();
    compact->plan({0}, rig.image->size(), all_of_it);
    const std::uint64_t home = rig.l2_home(0);
    CHECK(rig.reads_right(0, 48 * cluster)); // the table is in memory
    Beside guest, mover;
    // The move has put the table together and is about to write it, or has just written it.
    const auto when = GENERATE(Breakpoint::When::before, Breakpoint::When::after);
    Breakpoint in_move(rig.disk, when, is(Op::write));
    mover.start([&] { run_plan(*compact, rig.image->size()); });
    REQUIRE(in_move.wait());
    guest.start([&] {
        rig.write(60 * cluster, 4 * cluster, 60);
        rig.trim(10 * cluster, 2 * cluster);
    });
    guest.finished(a_while);
    in_move.release();
    guest.join();
    mover.join();
    CHECK(rig.l2_home(0) < home);
    rig.image->flush();
    rig.crash_and_reopen();
    CHECK(rig.reads_right());
    CHECK(rig.compact() > 0);
    rig.finish();
}

TEST_CASE("ocaml-qcow#75: a referrer and what it refers to move in the same commit, whenever the power fails") {
    ImagePlan plan;
    plan.cluster_bits = 12;
    plan.virtual_size = 1100 * cluster; // three L2 tables
    for (std::uint64_t c = 0; c < 24; ++c)
        plan.data[c * 47] = 120 + c * 31 % 24 * 2;
    plan.metadata_at = 200; // header, table, block, L1 and L2 tables: everything but the header has to move
    const BuiltImage built = build_image(plan);
    const std::uint64_t seed = fresh_seed();
    INFO("QLEAN_SEED=" << seed);
    Scene scene(built.bytes);
    Compact compact(*scene.image, scene.ownership, scene.gauges, 1);
    scene.guest->write(5 * 47 * cluster + 100, 3000);
    run_plan(compact, scene.image->size());
    scene.guest->write(6 * 47 * cluster + 100, 3000);
    compact.commit(go_on);
    // All of it has moved in this one commit, each to where its referrer says.
    const Bytes bytes = scene.disk->bytes();
    CHECK(bytes.size() < 60 * cluster);
    CHECK(load_be<std::uint64_t>(bytes, 40) < 60 * cluster); // L1 table
    CHECK(load_be<std::uint64_t>(bytes, 48) < 60 * cluster); // refcount table
    INFO(judge(bytes).text());
    CHECK(judge(bytes).clean());
    CHECK((guest_bytes(bytes) == scene.guest->now()));
    scene.guest->check(0, scene.image->size());
    CHECK(scene.cut_everywhere(seed, 4) == "");
}

TEST_CASE("ocaml-qcow 0.9.1-0.9.3: metadata does not move under a read of the guest") {
    Rig rig(build_image(tables_far_away()).bytes);
    const auto compact = rig.connect();
    compact->plan({0}, rig.image->size(), all_of_it);
    Beside guest, mover;
    Breakpoint in_table(rig.disk, Breakpoint::When::before, touches(Op::read, rig.l2_home(0), cluster));
    guest.start([&] { rig.must_read(0, 48 * cluster); });
    REQUIRE(in_table.wait());
    mover.start([&] {
        run_plan(*compact, rig.image->size());
        compact->commit(go_on);
        rig.image->write(bytes_of(8 * cluster, 0xee), {200 * cluster}); // reuses what the move has freed
        rig.image->flush();
    });
    CHECK_FALSE(mover.finished(a_while));
    in_table.release();
    guest.join();
    mover.join();
    std::fill_n(rig.model.begin() + 200 * cluster, 8 * cluster, std::byte{0xee});
    rig.finish();
}

TEST_CASE("ocaml-qcow 0.9.1-0.9.4: the file does not shrink over the target of a write in flight") {
    Rig rig(build_image(half_far_away().map_all(20)).bytes); // nothing is free below the end
    const auto compact = rig.connect();
    compact->plan({0}, rig.image->size(), all_of_it);
    rig.trim(0, 100 * cluster); // plenty to give back later
    Beside guest;
    Requests writes(rig.disk, is(Op::write));
    Breakpoint in_write(rig.disk, Breakpoint::When::before, is(Op::write));
    guest.start([&] { rig.write(64 * cluster, 4 * cluster, 5); });
    REQUIRE(in_write.wait());
    const Request target = writes.seen().front();
    // The rest of the file is given back and cut.
    compact->commit(go_on);
    rig.image->give_back();
    CHECK(rig.disk->length() >= target.at + target.length);
    rig.write(16 * cluster, 16 * cluster, 6); // and nobody else is given it
    const auto seen = writes.seen();
    CHECK_FALSE(any_overlaps({seen.begin() + 1, seen.end()}, target.at, target.length));
    in_write.release();
    guest.join();
    CHECK(rig.compact() > 0);
    rig.finish();
}

TEST_CASE("ocaml-qcow 0.9.1-0.9.4: nothing is allocated in the tail that is about to be cut off") {
    Rig rig(build_image(half_far_away()).bytes);
    const auto compact = rig.connect();
    run_plan(*compact, rig.image->size());
    Beside shrinker, guest;
    Requests cuts(rig.disk, [&](const Request &r) { return r.op == Op::truncate; });
    Breakpoint in_cut(rig.disk, Breakpoint::When::before, is(Op::truncate));
    shrinker.start([&] { compact->commit(go_on); });
    REQUIRE(in_cut.wait());
    const std::uint64_t end = cuts.seen().front().at;
    REQUIRE(end < rig.disk->length());
    Requests writes(rig.disk, is(Op::write));
    guest.start([&] { rig.write(100 * cluster, 60 * cluster, 8); }); // has to grow the file
    guest.finished(a_while);
    for (const Request &r : writes.seen())
        CHECK(r.at + r.length <= end);
    in_cut.release();
    shrinker.join();
    guest.join();
    CHECK(rig.reads_right());
    rig.finish();
}

TEST_CASE("ocaml-qcow 0.9.4: the destination of a move under way is not used again") {
    Rig rig(build_image(half_far_away()).bytes);
    auto compact = rig.connect();
    compact->plan({0}, rig.image->size(), all_of_it);
    rig.disk->start_cold(true);
    Beside mover;
    Breakpoint in_move(rig.disk, Breakpoint::When::after, touches(Op::read, rig.host_of(30), cluster));
    mover.start([&] { compact->run({0}, rig.image->size(), go_on); });
    REQUIRE(in_move.wait());
    // The guest allocates, and takes from the mover what it has planned: its destinations come back unused.
    rig.write(64 * cluster, 40 * cluster, 1);
    rig.trim(30 * cluster, 4 * cluster);
    rig.write(36 * cluster, 4 * cluster, 2);
    rig.trim(36 * cluster, 4 * cluster);
    rig.write(34 * cluster, 8 * cluster, 3);
    rig.image->give_back();
    rig.write(104 * cluster, 20 * cluster, 4);
    CHECK_FALSE(mover.finished());
    in_move.release();
    mover.join();
    rig.write(124 * cluster, 20 * cluster, 5);
    CHECK(rig.reads_right());
    compact->commit(go_on);
    rig.write(144 * cluster, 20 * cluster, 6);
    CHECK(rig.reads_right());
    compact.reset();
    CHECK(rig.compact() > 0);
    rig.finish();
}

TEST_CASE("ocaml-qcow 0.9.4: a flush that races with moves publishes no reference before its target is durable") {
    ImagePlan plan = half_far_away();
    const std::uint64_t seed = fresh_seed();
    INFO("QLEAN_SEED=" << seed);
    Scene scene(build_image(plan).bytes);
    Compact compact(*scene.image, scene.ownership, scene.gauges, 1);
    compact.plan({0}, scene.image->size(), all_of_it);
    const std::uint64_t which = GENERATE(1u, 2u); // the sync of the flush in which the moves happen
    scene.guest->write(200 * cluster, 2 * cluster);
    scene.guest->trim(0, 4 * cluster);
    Beside flush;
    std::atomic<std::uint64_t> syncs{0};
    Breakpoint in_sync(scene.disk, Breakpoint::When::before,
                       [&](const Request &r) { return r.op == Op::sync && ++syncs == which; });
    flush.start([&] { scene.guest->flush(); });
    REQUIRE(in_sync.wait());
    compact.run({0}, scene.image->size(), go_on); // stores entries while the flush writes others
    in_sync.release();
    flush.join();
    scene.guest->check(0, scene.image->size());
    scene.guest->write(210 * cluster, 2 * cluster);
    compact.commit(go_on);
    scene.guest->flush();
    const Bytes bytes = scene.disk->bytes();
    INFO(judge(bytes).text());
    CHECK(judge(bytes).sound());
    CHECK((guest_bytes(bytes) == scene.guest->now()));
    CHECK(scene.cut_everywhere(seed, 6) == "");
}
