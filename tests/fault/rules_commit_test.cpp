// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The rules of commits, each with the sequence of events that loses data without it: what a commit writes, what a sync
// covers, who may write metadata, what durable means for FUA.
#include "lib/byte_order.h"
#include "tests/fault/scene.h"

#include <future>
#include <string>
#include <thread>
#include <vector>

using namespace qlean;
using namespace qlean::fault;

namespace {

constexpr std::uint64_t cluster = 512;

/// 64 guest clusters at 8, 9, …, then metadata; one L2 table, one slice of it.
BuiltImage mapped_image(std::uint64_t guest_clusters = 64, std::uint64_t mapped = 32) {
    ImagePlan plan;
    plan.virtual_size = guest_clusters * cluster;
    return build_image(plan.map(mapped, 8));
}

std::uint64_t syncs(const FaultyDisk &disk) { return disk.count(mask(Op::sync)); }

} // namespace

TEST_CASE("A2: a commit writes copies, so an entry stored during its first sync is not published by its second step") {
    const BuiltImage built = mapped_image();
    Scene s(built.bytes);
    s.guest->write(40 * cluster, cluster); // e1: the slice is dirty
    Beside flush;
    Breakpoint in_sync(s.disk, Breakpoint::When::before, is(Op::sync));
    flush.start([&] { s.image->flush(); });
    REQUIRE(in_sync.wait());
    s.image->write(bytes_of(cluster, 7), {50 * cluster}); // e2: its data and refcount are covered by no sync yet
    in_sync.release();
    flush.join();
    const Bytes now = s.disk->bytes();
    CHECK(load_be<std::uint64_t>(now, built.l2_entry_at(40)) != 0);
    CHECK(load_be<std::uint64_t>(now, built.l2_entry_at(50)) == 0);
}

TEST_CASE("A2: a flush of a slice that is written all the time ends") {
    Scene s(mapped_image().bytes);
    std::atomic<std::uint64_t> next{33};
    std::thread::id flusher = std::this_thread::get_id();
    const int hook = s.disk->add_hook(true, [&](const Request &r) {
        // While the flush syncs, the guest dirties the slice again.
        if (r.op != Op::sync || std::this_thread::get_id() != flusher || next == 60)
            return;
        Beside writer;
        writer.start([&] { s.image->write(bytes_of(cluster, 9), {next++ * cluster}); });
        writer.join();
    });
    s.image->write(bytes_of(cluster, 8), {32 * cluster});
    const auto before = syncs(*s.disk);
    s.image->flush();
    s.disk->remove_hook(hook);
    CHECK(syncs(*s.disk) - before == 2);
    CHECK(next > 33);
}

TEST_CASE("A2: a write that returned while a sync was under way needs the next one") {
    const auto disk = std::make_shared<FaultyDisk>(bytes_of(4096, 0));
    FaultyFile file(disk);
    SyncLog log(file);
    const auto before = log.needs();
    Beside sync;
    Breakpoint in_sync(disk, Breakpoint::When::before, is(Op::sync));
    sync.start([&] { log.sync(); });
    REQUIRE(in_sync.wait());
    file.write(bytes_of(512, 1), HostOffset{0});
    const auto needs = log.needs();
    in_sync.release();
    sync.join();
    CHECK(log.is_durable(before));
    CHECK_FALSE(log.is_durable(needs));
    log.sync();
    CHECK(log.is_durable(needs));
}

TEST_CASE("A2: data written during a commit's only sync is not taken for durable by the next one") {
    // The first commit's sync is under way when the guest writes data and stores the entry. The next commit must sync
    // again before it publishes the entry: cut the power everywhere.
    const std::uint64_t seed = fresh_seed();
    INFO("QLEAN_SEED=" << seed);
    Scene s(mapped_image().bytes);
    s.guest->write(0, cluster); // in place: the flush has one sync, of data
    {
        Beside flush;
        Breakpoint in_sync(s.disk, Breakpoint::When::before, is(Op::sync));
        flush.start([&] { s.image->flush(); });
        REQUIRE(in_sync.wait());
        s.guest->write(45 * cluster, cluster);
        in_sync.release();
        flush.join();
    }
    s.guest->flush();
    CHECK(s.cut_everywhere(seed, 12) == "");
}

TEST_CASE("A2: a flush that arrives after the leader has copied waits for the next round") {
    const BuiltImage built = mapped_image();
    Scene s(built.bytes);
    s.guest->write(40 * cluster, cluster);
    Beside first;
    Breakpoint in_sync(s.disk, Breakpoint::When::before, is(Op::sync));
    first.start([&] { s.image->flush(); });
    REQUIRE(in_sync.wait());
    s.guest->write(50 * cluster, cluster);
    std::thread release([&] {
        std::this_thread::sleep_for(a_while);
        in_sync.release();
    });
    s.guest->flush(); // promises the write above
    release.join();
    first.join();
    CHECK(s.cut_everywhere(1, 12) == "");
}

TEST_CASE("A2: concurrent flushes share a round") {
    Scene s(mapped_image().bytes);
    s.guest->write(40 * cluster, cluster);
    Beside first;
    {
        Breakpoint in_sync(s.disk, Breakpoint::When::before, is(Op::sync));
        first.start([&] { s.image->flush(); });
        REQUIRE(in_sync.wait());
        s.image->write(bytes_of(cluster, 3), {41 * cluster});
        std::vector<std::unique_ptr<Beside>> others;
        for (int i = 0; i < 6; ++i)
            others.emplace_back(std::make_unique<Beside>())->start([&] { s.image->flush(); });
        std::this_thread::sleep_for(a_while);
        const auto before = syncs(*s.disk);
        in_sync.release();
        for (auto &other : others)
            other->join();
        // One more of the first round, two of the round that all of them share; some may come too late for it.
        CHECK(syncs(*s.disk) - before <= 5);
    }
    first.join();
}

TEST_CASE("A2: a slice that is being written is not evicted, nor read back from the file before the write landed") {
    // Sixteen L2 tables in a cache that holds few slices.
    ImagePlan plan;
    plan.virtual_size = 400 * 64 * cluster;
    for (std::uint64_t table = 0; table < 400; ++table)
        plan.data[table * 64] = 8 + table;
    const BuiltImage built = build_image(plan);
    Scene s(built.bytes, 4096);
    s.image->write(bytes_of(cluster, 0x77), {cluster}); // guest cluster 1: table 0
    Beside flush;
    Breakpoint writing(s.disk, Breakpoint::When::before, touches(Op::write, built.l2_tables.at(0), cluster));
    flush.start([&] { s.image->flush(); });
    REQUIRE(writing.wait());
    for (int round = 0; round < 3; ++round)
        for (std::uint64_t table = 1; table < 400; ++table)
            read_some(*s.image, table * 64 * cluster, 1);
    CHECK(all_are(read_some(*s.image, cluster, cluster), 0x77));
    writing.release();
    flush.join();
    CHECK(all_are(read_some(*s.image, cluster, cluster), 0x77));
}

TEST_CASE("A2: nobody but the leader writes metadata, however small the cache") {
    ImagePlan plan;
    plan.virtual_size = 200 * 64 * cluster;
    for (std::uint64_t table = 0; table < 200; ++table)
        plan.data[table * 64] = 8 + table;
    const BuiltImage built = build_image(plan);
    Scene s(built.bytes, 4096);
    std::atomic<int> wrong{0};
    std::atomic<bool> committing{false};
    const std::uint64_t metadata = built.l2_tables.at(0); // metadata lies behind the data
    const std::uint64_t metadata_end = built.bytes.size();
    const int hook = s.disk->add_hook(true, [&](const Request &r) {
        if (r.op == Op::write && r.at < metadata_end && r.at + r.length > metadata && !committing)
            ++wrong;
    });
    for (std::uint64_t table = 0; table < 200; ++table) {
        s.image->write(bytes_of(cluster, 5), {(table * 64 + 1) * cluster});
        read_some(*s.image, (table * 37 % 200) * 64 * cluster, cluster);
    }
    CHECK(wrong == 0);
    committing = true;
    s.image->flush();
    s.disk->remove_hook(hook);
    for (std::uint64_t table = 0; table < 200; ++table)
        CHECK(all_are(read_some(*s.image, (table * 64 + 1) * cluster, cluster), 5));
}

TEST_CASE("A6: a flush after a write in place commits the mapping that a move left uncommitted") {
    // FUA is write and flush. The cluster was moved; the durable L2 table still reaches the old one.
    ImagePlan plan;
    plan.virtual_size = 64 * cluster;
    for (std::uint64_t c = 0; c < 32; ++c)
        plan.data[c] = 8 + c * 4;
    Scene s(build_image(plan).bytes);
    Compact compact(*s.image, s.ownership, s.gauges, 1);
    (void)compact.plan({0}, s.image->size(), 1000);
    compact.run({0}, s.image->size(), never);
    REQUIRE(s.gauges.moved_bytes > 0);
    s.guest->write(31 * cluster + 7, 100); // now at its new place
    const auto before = s.disk->recorded();
    s.guest->flush();
    s.guest->write(30 * cluster, 100);
    REQUIRE(s.disk->recorded() > before);
    // The engine is torn down first: its compaction ends without a commit of its own that counts for the promise.
    PowerCuts cuts(*s.disk);
    cuts.move_to(s.disk->recorded());
    const Bytes left = cuts.image(std::vector<Fate>(cuts.uncertain().size()));
    CHECK(judge(left).sound());
    const auto lost = s.guest->verdict(guest_bytes(left), cuts.moment());
    CHECK(lost.value_or("") == "");
}

TEST_CASE("A flush has two syncs, one when no metadata changed, and three when space is given back") {
    Scene s(mapped_image().bytes);
    s.image->flush();
    auto before = syncs(*s.disk);
    s.image->write(bytes_of(cluster, 1), {0});
    s.image->flush();
    CHECK(syncs(*s.disk) - before == 1);
    before = syncs(*s.disk);
    s.image->write(bytes_of(cluster, 1), {40 * cluster});
    s.image->flush();
    CHECK(syncs(*s.disk) - before == 2);
    before = syncs(*s.disk);
    s.image->trim({0}, 4 * cluster);
    s.image->give_back();
    CHECK(syncs(*s.disk) - before == 3);
}

TEST_CASE("B1: commits for which there is no room for a larger refcount table do not lengthen the file") {
    const auto disk = std::make_shared<FaultyDisk>(empty_image(64 * 1024 * 1024, 512));
    const auto image = open_image(disk, false, 1024 * 1024);
    const Allocator &allocator = image->state().allocator;
    // Until the next commit wants blocks that the table, of 64 entries, has no room for.
    const std::uint64_t ahead = 8193, per_block = 256;
    const auto at_the_end = [&] {
        return allocator.covered_end() < allocator.end() + ahead / 2 && (allocator.end() + ahead) / per_block >= 64;
    };
    std::uint64_t at = 0;
    for (; !at_the_end(); at += 4096) {
        REQUIRE(at < image->size());
        image->write(bytes_of(4096, 1), {at});
        if (!at_the_end())
            image->flush();
    }
    const std::uint64_t full = disk->length();
    Fault fault;
    fault.ops = mask(Op::write);
    fault.code = ENOSPC;
    fault.lasting = true;
    fault.only = [&](const Request &r) { return r.at + r.length > full; };
    disk->fail(fault);
    for (unsigned i = 0; i < 40; ++i) {
        image->write(bytes_of(65536, 2 + i), {0});
        image->trim({65536}, 65536);
        image->flush();
    }
    CHECK(disk->struck() > 0);
    CHECK(disk->length() <= allocator.covered_end() * 512); // up to there there are blocks
    disk->heal();
    image->write(bytes_of(65536, 99), {at});
    image->flush();
    CHECK(image->state().refcounts.table_entries() > 64);
    const Bytes model = read_all(*image);
    image->close();
    CHECK((guest_bytes(disk->bytes()) == model));
    CHECK(judge(disk->bytes()).clean());
}

TEST_CASE("B1: what is taken back of a claim behind the file is not what the guest has got behind that") {
    // The end of the file has no refcount block, what comes behind has one: so the file can grow from where the claim
    // ends.
    constexpr std::uint64_t per_block = 256, first = 20, mapped = per_block - first, low = 16, end = 490;
    ImagePlan plan;
    plan.metadata_at = 1;
    plan.virtual_size = 512 * cluster;
    plan.map(mapped, first);
    BuiltImage built = build_image(plan);
    REQUIRE(built.bytes.size() == per_block * cluster);
    built.bytes.resize(end * cluster);
    const std::uint64_t table = built.word(48), block = built.word(table);
    REQUIRE(load_be<std::uint16_t>(built.bytes, block + low * 2) == 0);
    store_be<std::uint16_t>(built.bytes, block + low * 2, 1);
    REQUIRE(built.word(table + 8) == 0);
    built.set_word(table + 16, low * cluster);
    const auto disk = std::make_shared<FaultyDisk>(built.bytes);
    const auto image = open_image(disk);
    Bytes model = read_all(*image);
    const auto write = [&](std::uint64_t c, std::uint64_t count, unsigned value) {
        image->write(bytes_of(count * cluster, value), {c * cluster});
        std::fill_n(model.begin() + static_cast<std::ptrdiff_t>(c * cluster), count * cluster, std::byte(value));
    };
    write(mapped, 1, 7); // so that a commit has something to do
    REQUIRE(finds_no_room(*image));
    Fault fault;
    fault.ops = mask(Op::write);
    fault.code = ENOSPC;
    fault.only = touches(Op::write, end * cluster, cluster);
    disk->fail(fault);
    Breakpoint claimed(disk, Breakpoint::When::before, touches(Op::write, end * cluster, cluster));
    Beside commit;
    commit.start([&] { image->flush(); });
    REQUIRE(claimed.wait());
    REQUIRE(image->state().allocator.end() > 2 * per_block);
    write(mapped + 1, 40, 8);
    claimed.release();
    commit.join();
    CHECK(disk->struck() == 1);
    CHECK((read_all(*image) == model));
    disk->heal();
    image->flush();
    image->close();
    CHECK((guest_bytes(disk->bytes()) == model));
    CHECK(judge(disk->bytes()).sound());
}

TEST_CASE("B1: growing the refcount structures is safe at every moment, and costs no more than two syncs more") {
    const std::uint64_t seed = fresh_seed();
    INFO("QLEAN_SEED=" << seed);
    // A table of one cluster describes 8 MiB; 4 MiB ahead of the end it has to grow.
    Scene s(empty_image(8 * 1024 * 1024, cluster));
    s.guest->write(0, 1024 * 1024);
    std::uint64_t most = 0;
    for (int i = 0; i < 6; ++i) {
        s.guest->write((1 + i) * 1024 * 1024, 1024 * 1024);
        const auto before = syncs(*s.disk);
        s.guest->flush();
        most = std::max(most, syncs(*s.disk) - before);
    }
    CHECK(load_be<std::uint32_t>(s.disk->bytes(), 56) > 1);
    CHECK(most <= 4);
    s.image->state().write_back.commit(WriteBack::Give::back);
    CHECK(judge(s.disk->bytes()).clean()); // of the old table nothing is left
    const std::size_t all = s.disk->recorded();
    CHECK(s.cut_everywhere(seed, 2, all > 60 ? all - 60 : 0) == "");
}

TEST_CASE("B1: no cluster is handed out whose refcount block is not durably linked") {
    Scene s(empty_image(2 * 1024 * 1024, cluster));
    // Every entry published, at every flush, has a block in the file to count it: no sync of the block is pending.
    for (int i = 0; i < 24; ++i) {
        s.guest->write(static_cast<std::uint64_t>(i) * 64 * 1024, 64 * 1024);
        CHECK(s.image->state().allocator.end() <= s.image->state().allocator.covered_end());
    }
    CHECK(s.cut_everywhere(3, 1) == "");
}

TEST_CASE("B1: what could not be counted, for a refcount could not be read, is counted once by the next commit") {
    ImagePlan plan;
    plan.metadata_at = 1;
    plan.virtual_size = 900 * cluster;
    plan.map(250, 30, 3); // with room in each of three regions of 256 clusters
    const BuiltImage built = build_image(plan);
    for (std::uint64_t nth = 1;; ++nth) {
        INFO("read " << nth << " fails");
        const auto disk = std::make_shared<FaultyDisk>(built.bytes);
        auto image = open_image(disk);
        Bytes model = read_all(*image);
        const Bytes more = bytes_of(400 * cluster, 0x77);
        image->write(more, {400 * cluster});
        std::copy(more.begin(), more.end(), model.begin() + 400 * cluster);
        Fault fault;
        fault.ops = mask(Op::read);
        fault.nth = nth;
        disk->fail(fault);
        bool failed = false;
        try {
            image->flush();
        } catch (const Error &) {
            failed = true;
        }
        disk->heal();
        image->flush();
        image->close();
        CHECK((guest_bytes(disk->bytes()) == model));
        CHECK(judge(disk->bytes()).clean());
        if (!failed) {
            CHECK(nth > 2); // there was something to fail
            break;
        }
    }
}

TEST_CASE("No cut while blocks are linked for a file that is longer than what is counted does harm") {
    constexpr std::uint64_t size = 512;
    ImagePlan plan;
    plan.metadata_at = 1;
    plan.virtual_size = 700 * size;
    plan.map(GENERATE(100, 235), 21); // new blocks go before the end, or behind it
    BuiltImage built = build_image(plan);
    REQUIRE(built.bytes.size() <= 256 * size);
    built.bytes.resize(300 * size); // and 256 have a block
    Scene s(built.bytes, 64 * 1024, false);
    s.guest->write(0, 4 * size);
    s.guest->flush();
    s.guest->write(300 * size, 300 * size);
    s.guest->flush();
    compact_all(*s.image);
    CHECK((read_all(*s.image) == s.guest->now()));
    CHECK(judge(s.disk->bytes()).clean());
    CHECK(s.cut_everywhere(1, 12) == "");
}

TEST_CASE("B2: flushes and tasks of the leader take turns, so that neither keeps out the other") {
    Scene s(build_image(ImagePlan{}).bytes);
    WriteBack &write_back = s.image->state().write_back;
    std::mutex mutex;
    std::vector<std::string> events;
    const auto happens = [&](const char *what) {
        const std::lock_guard guard(mutex);
        if (events.empty() || events.back() != what)
            events.emplace_back(what);
    };
    s.image->write(bytes_of(512, 1), {0});
    const int hook = s.disk->add_hook(true, [&](const Request &r) {
        if (r.op == Op::sync)
            happens("round");
    });
    const auto task = [&] { write_back.lead([&] { happens("task"); }); };
    const auto flushes = [&] { s.image->flush(); };
    const auto waits = [&](Beside &beside, const std::function<void()> &what) {
        beside.start(what);
        CHECK_FALSE(beside.finished(a_while));
    };
    {
        // A task is being done, another one waits, and then a flush: which is next.
        std::promise<void> begun, ends;
        Beside first, second, flush;
        first.start([&] {
            write_back.lead([&] {
                begun.set_value();
                ends.get_future().wait();
            });
        });
        begun.get_future().wait();
        waits(second, task);
        waits(flush, flushes);
        ends.set_value();
        for (Beside *each : {&first, &second, &flush})
            each->join();
        CHECK(events == std::vector<std::string>{"round", "task"});
    }
    events.clear();
    {
        // A round is under way, a flush waits, and then a task: which is next.
        Beside flush, late_flush, late_task;
        Breakpoint syncing(s.disk, Breakpoint::When::after, is(Op::sync));
        flush.start(flushes);
        REQUIRE(syncing.wait());
        waits(late_flush, flushes);
        waits(late_task, task);
        syncing.release();
        for (Beside *each : {&flush, &late_flush, &late_task})
            each->join();
        CHECK(events == std::vector<std::string>{"round", "task", "round"});
    }
    s.disk->remove_hook(hook);
}

TEST_CASE("B2: many flushes and tasks of the leader at once all come to their end") {
    Scene s(build_image(ImagePlan{}).bytes);
    constexpr int each = 2000;
    std::atomic<int> tasks{0};
    Beside flushing[3], leading[3];
    for (Beside &thread : flushing)
        thread.start([&] {
            for (int i = 0; i < each; ++i)
                s.image->flush();
        });
    for (Beside &thread : leading)
        thread.start([&] {
            for (int i = 0; i < each; ++i)
                s.image->state().write_back.lead([&] { ++tasks; });
        });
    for (Beside &thread : flushing)
        thread.join();
    for (Beside &thread : leading)
        thread.join();
    CHECK(tasks == 3 * each);
}
