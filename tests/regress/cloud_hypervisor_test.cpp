// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Bugs of cloud-hypervisor's QCOW2 engine, found in production in 2026. Numbers are its issues and pull requests.
#include "tests/regress/rig.h"

#include "lib/byte_order.h"

#include <cstring>

using namespace qlean;
using namespace qlean::fault;

namespace {

constexpr std::uint64_t cluster = 4096;
constexpr std::uint64_t per_table = cluster / 8;

/// Four L2 tables' worth of disk; the first 64 clusters mapped, the first free host cluster beyond them.
BuiltImage some_mapped() {
    ImagePlan plan;
    plan.cluster_bits = 12;
    plan.virtual_size = 4 * per_table * cluster;
    plan.metadata_at = 4;
    return build_image(plan.map(64, 20));
}

} // namespace

TEST_CASE("cloud-hypervisor#8624: a delayed punch-hole does not erase a reused cluster") {
    Rig rig(some_mapped().bytes);
    PunchGuard guard(rig.disk);
    rig.trim(8 * cluster, 32 * cluster);
    Beside eraser;
    Requests punches(rig.disk, is(Op::punch));
    Breakpoint in_punch(rig.disk, Breakpoint::When::before, is(Op::punch));
    eraser.start([&] { rig.image->give_back(); });
    REQUIRE(in_punch.wait());
    const Request pending = punches.seen().front();
    CHECK(pending.length >= 32 * cluster);
    // Other queues: a flush, then data, new L2 tables and their commit.
    rig.image->flush();
    Requests writes(rig.disk, is(Op::write));
    rig.write(100 * cluster, 40 * cluster, 1);
    for (std::uint64_t table = 1; table < 4; ++table)
        rig.write(table * per_table * cluster + 3 * cluster, 2 * cluster, 10 + static_cast<unsigned>(table));
    rig.image->flush();
    CHECK(!writes.seen().empty());
    for (const Request &r : writes.seen())
        CHECK_FALSE(overlap(r.at, r.length, pending.at, pending.length));
    CHECK_FALSE(eraser.finished());
    in_punch.release();
    eraser.join();
    CHECK(rig.reads_right());
    rig.write(8 * cluster, 32 * cluster, 2); // now they may be used again
    rig.image->give_back();
    CHECK(guard.text() == "");
    rig.crash_and_reopen();
    rig.finish();
}

TEST_CASE("cloud-hypervisor#8624: a cluster that is reused before its punch has begun is not punched") {
    Rig rig(some_mapped().bytes);
    PunchGuard guard(rig.disk);
    rig.trim(8 * cluster, 16 * cluster);
    rig.image->state().write_back.commit(WriteBack::Give::back); // free, and waiting to be punched
    CHECK(rig.image->state().allocator.waiting_to_punch_bytes() == 16 * cluster);
    rig.write(per_table * cluster, 6 * cluster, 1); // takes some: a table and data
    rig.image->flush();
    rig.image->give_back(); // punches the others
    CHECK(guard.seen() > 0);
    CHECK(guard.text() == "");
    CHECK(rig.reads_right());
    // Freed, reused, freed and reused again while the first punch is still in the queue.
    for (unsigned i = 0; i < 8; ++i) {
        rig.trim(per_table * cluster, 6 * cluster);
        rig.image->state().write_back.commit(WriteBack::Give::back);
        rig.write(per_table * cluster, 6 * cluster, 50 + i);
        rig.image->state().write_back.commit(WriteBack::Give::back);
    }
    rig.image->give_back();
    CHECK(guard.text() == "");
    rig.crash_and_reopen();
    rig.finish();
}

TEST_CASE(
    "cloud-hypervisor#8721: a new L2 table is counted before the L1 table points at it, whenever the power fails") {
    const std::uint64_t seed = fresh_seed();
    INFO("QLEAN_SEED=" << seed);
    Scene scene(some_mapped().bytes);
    for (std::uint64_t table = 1; table < 4; ++table) {
        scene.guest->write(table * per_table * cluster + 7 * cluster, 100);
        if (table == 2)
            scene.guest->trim(0, 4 * cluster);
        scene.guest->flush();
    }
    const Bytes bytes = scene.disk->bytes();
    CHECK(judge(bytes).sound());
    CHECK((guest_bytes(bytes) == scene.guest->now()));
    CHECK(scene.cut_everywhere(seed, 20) == "");
}

TEST_CASE("cloud-hypervisor#8721: a commit of new L2 tables that fails half-way is sound and can be repeated") {
    const int code = GENERATE(EIO, ENOSPC);
    unsigned failures = 0;
    for (std::uint64_t nth = 1;; ++nth) {
        Rig rig(some_mapped().bytes);
        rig.image->flush();
        rig.write(per_table * cluster + cluster, 3 * cluster, 1);
        rig.write(2 * per_table * cluster + cluster, 3 * cluster, 2);
        rig.trim(0, 2 * cluster);
        Fault fault;
        fault.ops = mask(Op::write);
        fault.nth = nth;
        fault.code = code;
        fault.partial = 512;
        rig.disk->fail(fault);
        const std::string error = said([&] { rig.image->flush(); });
        const bool struck = rig.disk->struck();
        rig.disk->heal();
        INFO("the write number " << nth << " failed");
        CHECK(struck == !error.empty());
        const Verdict verdict = judge(rig.disk->bytes()); // as a crash now would leave it
        INFO(verdict.text());
        CHECK(verdict.sound());
        // The tables' clusters are not given to others.
        rig.write(3 * per_table * cluster, 5 * cluster, 3);
        rig.write(70 * cluster, 5 * cluster, 4);
        CHECK(rig.reads_right());
        CHECK_NOTHROW(rig.image->flush());
        rig.crash_and_reopen(); // the clusters that the crash leaks go with the next compaction
        CHECK(rig.compact() > 0);
        rig.finish();
        if (!struck)
            break;
        ++failures;
    }
    CHECK(failures >= 4);
}

TEST_CASE("cloud-hypervisor#8748: ENOSPC in the middle of a write does not lead to a double allocation") {
    unsigned failures = 0;
    const bool lasting = GENERATE(false, true);
    for (std::uint64_t nth = 1;; ++nth) {
        Rig rig(some_mapped().bytes);
        rig.image->flush();
        Fault fault;
        fault.ops = any_change & ~mask(Op::sync);
        fault.nth = nth;
        fault.code = ENOSPC;
        fault.lasting = lasting;
        fault.partial = 1024;
        rig.disk->fail(fault);
        // Mapped clusters, unmapped ones, the next L2 table; unaligned at both ends.
        const std::uint64_t at = (per_table - 12) * cluster + 100, length = 20 * cluster;
        const std::string error =
            said([&] { rig.write(60 * cluster + 50, 8 * cluster, 20); }) + said([&] { rig.write(at, length, 21); });
        const bool struck = rig.disk->struck();
        rig.disk->heal();
        INFO("change number " << nth << " failed: " << error);
        // Once is not enough for the guest to hear of it: space is given back and the write tried again.
        CHECK((!lasting || struck == !error.empty()));
        // Others allocate now; then the guest repeats what failed.
        rig.write(2 * per_table * cluster + 10, 9 * cluster, 22);
        rig.write(100 * cluster + 10, 9 * cluster, 23);
        rig.write(60 * cluster + 50, 8 * cluster, 24);
        rig.write(at, length, 25);
        CHECK(rig.reads_right());
        rig.image->flush();
        CHECK(judge(rig.disk->bytes()).sound());
        rig.finish();
        if (!struck)
            break;
        ++failures;
    }
    CHECK(failures >= 4);
}

TEST_CASE("cloud-hypervisor#8606: tables in use are not handed out, even if a refcount says that they are free") {
    BuiltImage built = some_mapped();
    const std::vector<std::uint64_t> tables = {built.l2_tables.at(0), built.l1, built.refcount_table,
                                               built.refcount_blocks.at(0)};
    for (const std::uint64_t at : tables)
        store_be<std::uint16_t>(std::span(built.bytes), built.refcount_at(at / cluster, 12), 0);
    Rig rig(built.bytes);
    Requests writes(rig.disk, [](const Request &r) { return r.op == Op::write && r.length == 3 * cluster; });
    PunchGuard guard(rig.disk);
    for (std::uint64_t c = 100; c < 400; c += 3)
        rig.write(c * cluster, 3 * cluster, 1 + static_cast<unsigned>(c % 250));
    rig.trim(100 * cluster, 200 * cluster);
    rig.image->give_back();
    CHECK(writes.seen().size() > 50);
    for (const Request &r : writes.seen())
        for (const std::uint64_t at : tables)
            CHECK_FALSE(overlap(r.at, r.length, at, cluster));
    // Compaction says what is wrong, and does nothing.
    const auto compact = rig.connect();
    CHECK(said([&] { compact->commit(go_on); }).find("qemu-img check") != std::string::npos);
    CHECK(rig.reads_right());
    rig.image->close();
    const Bytes bytes = rig.disk->bytes();
    for (const std::uint64_t at : tables) // the tables themselves are where they were
        CHECK(std::memcmp(bytes.data() + at, "\xee\xee\xee\xee", 4) != 0);
    CHECK((guest_bytes(bytes) == rig.model));
    const Verdict verdict = judge(bytes);
    INFO(verdict.text());
    CHECK(verdict.leaks == 0);
    for (const auto &line : verdict.corruptions) { // what was planted, and nothing else
        const bool planted = std::any_of(tables.begin(), tables.end(), [&](std::uint64_t at) {
            return line.find(fmt::format("cluster {} ", at / cluster)) != std::string::npos;
        });
        CHECK(planted);
    }
}

TEST_CASE("cloud-hypervisor#8606: tables that come, go and move for a long time never share a cluster") {
    const std::uint64_t seed = fresh_seed();
    INFO("QLEAN_SEED=" << seed);
    std::mt19937_64 random(seed);
    Rig rig(empty_image(1024 * 1024, 512)); // 32 L2 tables, refcount blocks of 128 KiB each
    PunchGuard guard(rig.disk);
    for (int round = 0; round < 300; ++round) {
        const std::uint64_t at = random() % 2000 * 512, n = (1 + random() % 48) * 512;
        if (random() % 3 != 0)
            rig.write(at, n, 1 + random() % 255);
        else
            rig.trim(random() % 1500 * 512, 500 * 512);
        if (random() % 4 == 0)
            rig.image->flush();
        if (random() % 50 == 0)
            CHECK(rig.compact() > 0);
        if (random() % 60 == 0) {
            rig.image->give_back();
            CHECK(judge(rig.disk->bytes()).clean());
            rig.crash_and_reopen();
        }
    }
    CHECK(guard.text() == "");
    rig.finish();
}

TEST_CASE("cloud-hypervisor#8597: freed tables are used again, so the file does not grow from flush to flush") {
    Rig rig(some_mapped().bytes);
    rig.write(per_table * cluster, cluster, 1);
    rig.image->flush();
    const std::uint64_t length = rig.disk->length();
    auto compact = rig.connect();
    for (unsigned round = 0; round < 200; ++round) {
        const std::uint64_t table = 1 + round % 3;
        rig.write((table * per_table + round % per_table) * cluster, cluster, 1 + round);
        rig.image->flush();
        rig.trim(table * per_table * cluster, per_table * cluster);
        rig.image->flush();
        if (round % 2 == 0) { // finds the empty table, and drops it
            compact->plan({0}, rig.image->size(), all_of_it);
            compact->commit(go_on);
        }
    }
    compact.reset();
    CHECK(rig.disk->length() <= length + cluster);
    // What the allocator believes to be in use is what is in use: a strand would not show in any check.
    rig.image->give_back();
    const auto counts = rig.image->state().allocator.counts();
    CHECK(counts.retired == 0);
    std::uint64_t used = 0;
    Bytes bytes = rig.disk->bytes();
    const std::uint64_t block = load_be<std::uint64_t>(bytes, load_be<std::uint64_t>(bytes, 48));
    for (std::uint64_t c = 0; c < counts.end; ++c)
        used += load_be<std::uint16_t>(bytes, block + c * 2) != 0;
    CHECK(counts.live() == used);
    rig.finish();
}

TEST_CASE("cloud-hypervisor#8597: refcount structures that grew and shrank leave nothing behind in a running server") {
    Rig rig(empty_image(2 * 1024 * 1024, 512));
    std::uint64_t lean = 0, full = 0;
    for (unsigned round = 1; round <= 4; ++round) {
        rig.write(0, rig.image->size(), round);
        rig.image->flush();
        if (round == 1)
            full = rig.disk->length();
        CHECK(rig.disk->length() <= full + full / 20);
        rig.trim(64 * 1024, rig.image->size() - 64 * 1024);
        CHECK(rig.compact() > 0);
        if (round == 1)
            lean = rig.disk->length();
        CHECK(rig.disk->length() == lean);
    }
    CHECK(lean < full / 10);
    rig.finish();
}

TEST_CASE("cloud-hypervisor#8597: compaction of a file of many regions makes it shorter, and comes to an end") {
    ImagePlan plan; // 46 refcount blocks
    plan.virtual_size = 4 * 1024 * 1024;
    for (std::uint64_t c = 0; c < plan.guest_clusters(); c += 3)
        plan.data[c] = 3000 + c * 5 % 8192;
    Rig rig(build_image(plan).bytes);
    const std::uint64_t before = rig.disk->length();
    CHECK(rig.compact() > 0);
    CHECK(rig.disk->length() < before / 3);
    rig.finish();
}

TEST_CASE("cloud-hypervisor#8621: two queues write parts of one new cluster, and both are there") {
    Rig rig(empty_image(16 * 1024 * 1024, 65536));
    Beside first, second;
    Breakpoint in_write(rig.disk, Breakpoint::When::before, is(Op::write));
    first.start([&] { rig.write(65536 + 100, 4000, 1); });
    REQUIRE(in_write.wait()); // the cluster is chosen, its entry is not stored
    second.start([&] { rig.write(65536 + 30000, 4000, 2); });
    CHECK_FALSE(second.finished(a_while));
    in_write.release();
    first.join();
    second.join();
    rig.finish();
}

TEST_CASE("cloud-hypervisor#8621: two queues want the same new L2 table, and get one") {
    Rig rig(empty_image(4 * per_table * cluster, cluster));
    rig.image->flush();
    Beside first, second;
    Breakpoint in_table(rig.disk, Breakpoint::When::before, is(Op::reserve));
    first.start([&] { rig.write(2 * per_table * cluster, 3 * cluster, 1); });
    REQUIRE(in_table.wait()); // the cluster of the table is chosen, the L1 entry is not stored
    second.start([&] { rig.write((2 * per_table + 100) * cluster, 3 * cluster, 2); });
    second.finished(a_while);
    in_table.release();
    first.join();
    second.join();
    rig.image->flush();
    rig.crash_and_reopen();
    rig.finish();
}

TEST_CASE("cloud-hypervisor#8621: eight queues with small requests in the same clusters") {
    Rig rig(empty_image(2 * 1024 * 1024, 65536));
    constexpr std::uint64_t queues = 8, block = 4096;
    std::atomic<unsigned> wrong{0};
    std::vector<Beside> threads(queues);
    for (std::uint64_t queue = 0; queue < queues; ++queue)
        threads[queue].start([&, queue] {
            std::mt19937_64 random(queue);
            for (int i = 0; i < 600; ++i) {
                // Of each 16 blocks that share a cluster every queue has two.
                const std::uint64_t at = (random() % (512 / queues) * queues + queue) * block + random() % 1000;
                rig.write(at, 1 + random() % 3000, 1 + random() % 255);
                wrong += !rig.reads_right(round_down(at, block), block);
                if (i % 100 == 99)
                    rig.image->flush();
            }
        });
    for (auto &thread : threads)
        thread.join();
    CHECK(wrong == 0);
    rig.finish();
}
