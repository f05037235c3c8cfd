// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The rules of images with internal snapshots: what a deletion may free, what moves in a commit and in what steps, what
// a full disk and a crash leave to be done.
#include "lib/backing.h"
#include "lib/byte_order.h"
#include "lib/compact/metadata_moves.h"
#include "lib/compact/snapshot_delete.h"
#include "lib/compact/snapshot_moves.h"
#include "lib/compact/survey.h"
#include "tests/fault/scene_moves.h"

using namespace qlean;
using namespace qlean::fault;

namespace {

constexpr std::uint64_t copied = std::uint64_t{1} << 63;

void erase(Scene &s, const std::string &name) {
    SnapshotDelete deletion(*s.image, s.ownership, 9, name);
    deletion.run({0}, 1, never);
    deletion.commit(never);
}

bool no_extents(const Mapping &) { return false; }

/// Every fourth guest cluster is the snapshot's alone, and lies beyond what the guest has now.
ImagePlan high_up() {
    ImagePlan plan;
    plan.virtual_size = 4 * 64 * cluster;
    for (std::uint64_t c = 0; c < 4 * 64; ++c)
        plan.data[c] = c % 4 == 0 ? 700 + c : 30 + c;
    plan.metadata_at = 500;
    return plan;
}
void leave_to_the_snapshot(Scene &s) {
    for (std::uint64_t c = 0; c < 4 * 64; c += 4)
        s.guest->write(c * cluster, cluster);
    s.guest->flush();
}

/// What is written into a hole finds no room until the host has been given some back.
class HostIsFull {
  public:
    explicit HostIsFull(std::shared_ptr<FaultyDisk> disk) : disk_(std::move(disk)) {
        hook_ = disk_->add_hook(false, [this](const Request &r) {
            if (r.op == Op::punch || r.op == Op::truncate)
                full_ = false;
        });
        Fault fault;
        fault.ops = mask(Op::write);
        fault.code = ENOSPC;
        fault.lasting = true;
        fault.only = [this, now = disk_->bytes()](const Request &r) {
            const auto begin = now.begin() + static_cast<std::ptrdiff_t>(std::min<std::uint64_t>(r.at, now.size()));
            const auto end =
                now.begin() + static_cast<std::ptrdiff_t>(std::min<std::uint64_t>(r.at + r.length, now.size()));
            return full_ && std::all_of(begin, end, [](std::byte b) { return b == std::byte{0}; });
        };
        disk_->fail(fault);
    }
    ~HostIsFull() {
        disk_->heal();
        disk_->remove_hook(hook_);
    }
    bool struck() const { return disk_->struck(); }

  private:
    std::shared_ptr<FaultyDisk> disk_;
    std::atomic<bool> full_{true};
    int hook_;
};

} // namespace

TEST_CASE("Snapshots: one is found by its name first, then by its id") {
    const Bytes plain = build_image(metadata_last()).bytes;
    Scene s(with_snapshot(with_snapshot(with_snapshot(plain, "2"), "b"), "b"));
    const auto id_of = [&](const std::string &name_or_id) {
        const auto found = s.image->state().snapshots.find(name_or_id);
        return found ? found->entry().id : "none";
    };
    CHECK(id_of("2") == "1");
    CHECK(id_of("1") == "1");
    CHECK(id_of("b") == "2");
    CHECK(id_of("3") == "3");
    CHECK(id_of("c") == "none");
}

TEST_CASE("Snapshots: those of an image that lies below another are not read") {
    const auto disk = std::make_shared<FaultyDisk>(with_snapshot(build_image(metadata_last()).bytes, "a"));
    const FaultyFile overlay(std::make_shared<FaultyDisk>());
    const ChainLink link{nullptr, overlay};
    Image::Options options;
    options.read_only = true;
    options.above = &link;
    const std::uint64_t table = load_be<std::uint64_t>(disk->bytes(), 64);
    std::atomic<std::uint64_t> reads{0};
    const int hook = disk->add_hook(true, [&](const Request &r) { reads += r.op == Op::read && r.at == table; });
    const auto below = Image::open(std::make_unique<FaultyFile>(disk), options);
    CHECK(reads == 0);
    CHECK(open_image(disk, true)->state().snapshots.any());
    CHECK(reads == 1);
    CHECK((read_all(*below) == guest_bytes(disk->bytes())));
    disk->remove_hook(hook);
}

TEST_CASE("A5: a snapshot is not deleted from an image whose refcounts do not count its references") {
    ImagePlan plan = metadata_last();
    BuiltImage built = build_image(plan);
    built.bytes = with_snapshot(built.bytes, "a");
    const std::uint64_t host = plan.data.at(9);
    store_be<std::uint16_t>(built.bytes, built.refcount_at(host), 1); // the guest's and the snapshot's
    Scene s(built.bytes);
    CHECK(contains(error_of([&] { erase(s, "a"); }), "used twice, but has a refcount of 1"));
    s.image->give_back();
    CHECK((guest_bytes(s.disk->bytes()) == guest_bytes(built.bytes)));
    CHECK((snapshot_disks(s.disk->bytes()) == snapshot_disks(built.bytes)));
    CHECK(s.image->state().snapshots.use("a")); // it can be read again
}

TEST_CASE("A5: a deletion that is stopped while it compares has changed nothing") {
    const Bytes before = with_snapshot(build_image(metadata_last()).bytes, "a");
    Scene s(before);
    {
        SnapshotDelete deletion(*s.image, s.ownership, 9, "a");
        CHECK(contains(error_of([&] { deletion.run({0}, 1, [] { return true; }); }), "stopped"));
    }
    CHECK((snapshot_disks(s.disk->bytes()) == snapshot_disks(before)));
    erase(s, "a");
    CHECK(snapshot_disks(s.disk->bytes()).empty());
}

TEST_CASE("COPIED flags that a crash left clear are set by compaction, in L1 and in L2") {
    const bool in_l1 = GENERATE(true, false);
    ImagePlan plan;
    plan.virtual_size = 4 * 64 * cluster;
    plan.data[3] = 10; // where compaction leaves everything as it is
    BuiltImage built = build_image(plan);
    const std::uint64_t at = in_l1 ? built.l1 : built.l2_entry_at(3);
    built.set_word(at, built.word(at) & ~copied);
    Scene s(built.bytes);
    compact(s);
    s.image->close();
    const Bytes now = s.disk->bytes();
    const std::uint64_t l1_word = load_be<std::uint64_t>(now, load_be<std::uint64_t>(now, 40));
    CHECK((l1_word & copied) != 0);
    CHECK((load_be<std::uint64_t>(now, (l1_word & entry::offset_mask) + 3 * 8) & copied) != 0);
    const QemuVerdict qemu = ask_qemu(now);
    INFO(qemu.output);
    CHECK((!qemu.available || qemu.status == 0));
}

// As QEMU's loadvm leaves it: the VM state of the snapshot is mapped in the active image as well.
TEST_CASE("COPIED flags of what is mapped beyond the end of the disk are set when the snapshot that had it goes") {
    ImagePlan plan;
    plan.virtual_size = 4 * 64 * cluster;
    for (const std::uint64_t c : {3, 69, 70, 100, 200})
        plan.data[c] = 10 + c;
    BuiltImage built = build_image(plan);
    built.set_word(24, 70 * cluster);
    Scene s(with_snapshot(built.bytes, "a"));
    erase(s, "a");
    s.image->close();
    const Bytes now = s.disk->bytes();
    INFO(judge(now).text());
    CHECK(judge(now).clean());
    const std::uint64_t l1 = load_be<std::uint64_t>(now, 40);
    for (const auto &[guest, host] : plan.data) {
        const std::uint64_t l1_word = load_be<std::uint64_t>(now, l1 + guest / 64 * 8);
        INFO(guest);
        CHECK((l1_word & copied) != 0);
        const std::uint64_t word = load_be<std::uint64_t>(now, (l1_word & entry::offset_mask) + guest % 64 * 8);
        CHECK((word & copied) != 0);
    }
    const QemuVerdict qemu = ask_qemu(now);
    INFO(qemu.output);
    CHECK((!qemu.available || qemu.status == 0));
    CHECK(s.cut_everywhere(1) == ""); // and no flag without the count that it speaks of
}

TEST_CASE("COPIED flags that could not be set by one FLUSH are set by the next") {
    ImagePlan plan = metadata_last();
    BuiltImage built = build_image(plan);
    for (const auto &[guest, host] : plan.data)
        built.set_word(built.l2_entry_at(guest), built.word(built.l2_entry_at(guest)) & ~copied);
    Scene s(built.bytes);
    Compact compact(*s.image, s.ownership, s.gauges, 7);
    (void)compact.plan({0}, s.image->size(), 1000);
    SECTION("a table cannot be read") {
        Fault fault;
        fault.ops = mask(Op::read);
        s.disk->fail(fault);
        CHECK(!error_of([&] { compact.commit(never); }).empty());
        CHECK(s.disk->struck());
        s.disk->heal();
    }
    SECTION("it is stopped") {
        CHECK(!error_of([&] { compact.commit([] { return true; }); }).empty());
    }
    compact.commit(never);
    std::vector<Mapping> mappings(4 * 64);
    s.image->state().mapper.survey({0}, mappings);
    for (const Mapping &m : mappings)
        CHECK((!m.has_host() || m.copied));
}

TEST_CASE("C1: on a full host disk a commit gives back what came free, and goes on to move what snapshots have") {
    const Bytes before = with_snapshot(build_image(high_up()).bytes, "a");
    Scene s(before);
    leave_to_the_snapshot(s);
    Compact compact(*s.image, s.ownership, s.gauges, 7);
    (void)compact.plan({0}, s.image->size(), 100000);
    REQUIRE(s.gauges.pending > 60);
    s.guest->trim(0, cluster);
    {
        const HostIsFull full(s.disk);
        CHECK(error_of([&] { compact.commit(never); }) == "");
        CHECK(full.struck());
    }
    CHECK((snapshot_disks(s.disk->bytes()) == snapshot_disks(before)));
    fault::compact(s);
    CHECK(s.gauges.pending == 0);
    CHECK((snapshot_disks(s.disk->bytes()) == snapshot_disks(before)));
}

TEST_CASE("C1: on a full host disk a snapshot can be deleted as soon as anything has come free") {
    // The table without it is longer than any hole that something was in.
    const std::string other = std::string(3000, 'b');
    Scene s(with_snapshot(with_snapshot(build_image(high_up()).bytes, "a"), other));
    leave_to_the_snapshot(s);
    s.guest->trim(0, cluster);
    {
        const HostIsFull full(s.disk);
        CHECK(error_of([&] { erase(s, "a"); }) == "");
        CHECK(full.struck());
    }
    CHECK(snapshot_disks(s.disk->bytes()).size() == 1);
    s.guest->check(0, s.image->size());
    s.image->close();
    CHECK(judge(s.disk->bytes()).clean());
}

TEST_CASE("C1: what was found to lie beyond another end, and does not beyond this one, stays") {
    Scene s(with_snapshot(build_image(high_up()).bytes, "a"));
    leave_to_the_snapshot(s);
    State &state = s.image->state();
    SnapshotWork work = find_snapshot_work(state, {600}, no_extents, 1000, never);
    CHECK(work.clusters.size() == 64);
    REQUIRE(find_snapshot_work(state, {100}, no_extents, 1000, never).tables.size() == 4);
    const auto [i, table] = find_snapshot_work(state, {100}, no_extents, 1000, never).tables.front();
    bool moved = true;
    state.write_back.lead([&, i = i, table = table] { moved = move_snapshot_l2_table(state, i, table, {4000}); });
    CHECK_FALSE(moved);
    CHECK(move_snapshot_clusters(
              state, work, {4000}, [] {}, never) == 0);
    CHECK(find_snapshot_work(state, {600}, no_extents, 1000, never).clusters.size() == 64);
}

TEST_CASE("C1: a window is emptied of every host cluster that one guest cluster has in it") {
    ImagePlan plan;
    plan.virtual_size = 64 * cluster;
    plan.data[0] = 100;
    plan.metadata_at = 200;
    Scene s(with_snapshot(build_image(plan).bytes, "a"));
    s.guest->write(0, cluster);
    s.guest->flush();
    State &state = s.image->state();
    Mapping active, old;
    state.mapper.survey({0}, std::span(&active, 1));
    state.mapper.survey(*state.snapshots.find("a"), {0}, std::span(&old, 1));
    REQUIRE((active.host < old.host && old.host == HostCluster{100}));
    Layout layout;
    layout.end = {110};
    const std::uint64_t count = layout.end - active.host;
    REQUIRE(empty_window(
        state, layout, count, [](GuestCluster, std::uint64_t) {}, [] {}));
    state.write_back.commit(WriteBack::Give::back);
    for (HostCluster c = active.host; c < layout.end; ++c)
        CHECK(state.allocator.is_free(c));
    state.allocator.embargo({});
}

TEST_CASE("C2: tables that only snapshots have move in steps, as clusters do") {
    constexpr std::uint64_t block = 4096, tables = 400, per_table = 512;
    ImagePlan plan;
    plan.cluster_bits = 12;
    plan.virtual_size = tables * per_table * block;
    for (std::uint64_t i = 0; i < tables; ++i)
        plan.data[i * per_table] = 10 + i;
    plan.metadata_at = 2500;
    const auto disk = std::make_shared<FaultyDisk>(with_snapshot(build_image(plan).bytes, "a"));
    const auto image = open_image(disk);
    image->flush();
    for (std::uint64_t i = 0; i < tables; ++i)
        image->write(bytes_of(512, 1), {i * per_table * block}); // the active image gets tables of its own
    image->give_back();
    MoveOwnership ownership;
    Gauges gauges;
    Compact compact(*image, ownership, gauges, 7);
    (void)compact.plan({0}, image->size(), 100000);
    REQUIRE(gauges.pending >= static_cast<std::int64_t>(tables));
    std::uint64_t uncommitted = 0, most = 0, moved = 0;
    const int hook = disk->add_hook(true, [&](const Request &r) {
        if (r.op == Op::sync)
            uncommitted = 0;
        else if (r.op == Op::write && r.length == block && r.at < 2500 * block)
            most = std::max(most, uncommitted += r.length), ++moved;
    });
    const std::int64_t before = gauges.pending;
    compact.commit(never);
    disk->remove_hook(hook);
    CHECK(moved >= tables);
    CHECK(most <= 1024 * 1024 + 64 * block); // with what else is written in whole clusters
    CHECK(gauges.pending <= before - static_cast<std::int64_t>(tables));
}

TEST_CASE("C2: compressed extents that snapshots have move once, with every reference") {
    ImagePlan plan;
    plan.virtual_size = 4 * 64 * cluster;
    for (std::uint64_t c = 0; c < 120; ++c)
        plan.compressed[c] = c % 3 * 20;
    plan.compressed_at = 400;
    plan.data[200] = 900;
    plan.metadata_at = 700;
    const Bytes first = with_snapshot(build_image(plan).bytes, "a");
    Scene s(with_snapshot(first, "b"));
    const auto snapshots = snapshot_disks(s.disk->bytes());
    // A part of them is in three disks, a part in two; the first are the snapshots' alone.
    for (std::uint64_t c = 0; c < 120; c += c < 40 ? 1 : 4)
        s.guest->write(c * cluster, cluster);
    s.guest->flush();
    s.image->give_back();
    State &state = s.image->state();
    state.allocator.load_all();
    const std::uint64_t live = state.allocator.counts().live();
    compact(s);
    CHECK(s.gauges.pending == 0);
    CHECK(state.allocator.end() < 400);
    CHECK(state.allocator.end() <= live + 3);
    const Survey survey = survey_image(state, never);
    CHECK(survey.data + survey.packs + survey.metadata == state.allocator.counts().live());
    s.guest->check(0, s.image->size());
    CHECK((snapshot_disks(s.disk->bytes()) == snapshots));
    CHECK(s.cut_everywhere(fresh_seed(), 2) == "");
    CHECK(judge(s.disk->bytes()).clean());
}

TEST_CASE("C2: snapshots' tables are walked when a plan is read, not by each FLUSH, and the walk can be stopped") {
    Scene s(with_snapshot(build_image(high_up()).bytes, "a"));
    leave_to_the_snapshot(s);
    compact(s);
    REQUIRE(s.gauges.pending == 0);
    State &state = s.image->state();
    const auto snapshot = state.snapshots.find("a");
    Compact again(*s.image, s.ownership, s.gauges, 7);
    (void)again.plan({0}, s.image->size(), 1000);
    std::atomic<std::uint64_t> reads{0};
    const int hook = s.disk->add_hook(true, [&](const Request &r) {
        for (std::uint64_t i = 0; i < snapshot->l1_size(); ++i)
            reads += r.op == Op::read && snapshot->table(i).value != 0 && r.at < snapshot->table(i).value + cluster &&
                     snapshot->table(i).value < r.at + r.length;
    });
    again.commit(never);
    again.commit(never);
    CHECK(reads == 0);
    CHECK(contains(error_of([&] { (void)again.plan({0}, s.image->size(), 1000, [] { return true; }); }), "stopped"));
    CHECK(reads == 0);
    (void)again.plan({0}, s.image->size(), 1000);
    CHECK(reads > 0);
    s.disk->remove_hook(hook);
}

TEST_CASE("C1: the L1 tables of all snapshots move together, with two syncs") {
    constexpr std::uint64_t snapshots = 20;
    ImagePlan plan;
    plan.virtual_size = 4 * 64 * cluster;
    for (std::uint64_t i = 0; i < 4; ++i)
        plan.data[i * 64] = 80 + i;
    for (std::uint64_t c = 1; c < 80; ++c)
        plan.leaked.push_back(c);
    plan.metadata_at = 84;
    Bytes bytes = build_image(plan).bytes;
    for (std::uint64_t i = 0; i < snapshots; ++i)
        bytes = with_snapshot(std::move(bytes), std::to_string(i));
    Scene s(bytes);
    const auto highest = [&] {
        HostCluster end{0};
        for (const auto &snapshot : s.image->state().snapshots.list())
            end = std::max(end, snapshot->l1_run(s.image->geometry()).end());
        return end;
    };
    REQUIRE(highest() > HostCluster{100});
    {
        Compact compact(*s.image, s.ownership, s.gauges, 7);
        (void)compact.plan({0}, s.image->size(), 1000);
        const std::uint64_t before = s.disk->count(mask(Op::sync));
        compact.commit(never);
        CHECK(s.disk->count(mask(Op::sync)) - before < 2 * snapshots);
    }
    CHECK(highest() < HostCluster{80});
    CHECK((snapshot_disks(s.disk->bytes()) == snapshot_disks(bytes)));
    compact(s);
    s.image->close();
    CHECK(judge(s.disk->bytes()).clean());
}

TEST_CASE("C1: a snapshot table that is longer than what is linked ahead can be written anew") {
    constexpr std::uint64_t snapshots = 80, reserved = 10500;
    ImagePlan plan;
    plan.virtual_size = 64 * cluster;
    plan.data[0] = 10;
    for (std::uint64_t c = 0; c < reserved; ++c)
        plan.leaked.push_back(20 + c);
    plan.table_clusters = 2;
    BuiltImage built = build_image(plan);
    SnapshotTable table;
    for (std::uint64_t i = 0; i < snapshots; ++i) {
        SnapshotEntry entry; // of a disk with nothing in it
        entry.id = std::to_string(i);
        entry.name = std::to_string(i) + std::string(60000, 'n');
        entry.extra.resize(16);
        store_be<std::uint64_t>(entry.extra, 8, plan.virtual_size);
        table.entries.push_back(entry);
    }
    const Bytes encoded = table.encode();
    REQUIRE(encoded.size() > 4 * 1024 * 1024 + cluster * 1024);
    REQUIRE(encoded.size() < reserved * cluster);
    std::copy(encoded.begin(), encoded.end(), built.bytes.begin() + 20 * cluster);
    store_be<std::uint32_t>(built.bytes, 60, snapshots);
    store_be<std::uint64_t>(built.bytes, 64, 20 * cluster);
    Scene s(built.bytes);
    CHECK(error_of([&] { erase(s, "7"); }) == "");
    compact(s);
    s.image->close();
    CHECK(judge(s.disk->bytes()).clean());
    CHECK(open_image(s.disk)->state().snapshots.list().size() == snapshots - 1);
}

TEST_CASE("A walk over many snapshots with tables of their own can be stopped at each of them") {
    constexpr std::uint64_t count = 64;
    ImagePlan plan;
    plan.virtual_size = 64 * 512;
    plan.metadata_at = 200;
    plan.data[0] = 8;
    for (std::uint64_t c = 1; c < 64; ++c)
        plan.compressed[c] = 0;
    plan.compressed_at = 9;
    auto disk = std::make_shared<FaultyDisk>(build_image(plan).bytes);
    for (std::uint64_t n = 0; n < count; ++n) {
        disk = std::make_shared<FaultyDisk>(with_snapshot(disk->bytes(), std::to_string(n)));
        const auto image = open_image(disk);
        image->write(bytes_of(512, static_cast<unsigned>(n + 1)), {0}); // a table of its own from now on
        image->close();
    }
    Scene s(disk->bytes());
    REQUIRE(s.image->state().snapshots.list().size() == count);
    std::uint64_t asked = 0;
    each_snapshot_mapping(
        s.image->state(),
        [&] {
            ++asked;
            return false;
        },
        [](GuestCluster, const Mapping &) {});
    CHECK(asked >= count);
}
