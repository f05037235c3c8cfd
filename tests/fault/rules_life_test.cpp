// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The rules of a cluster's life and of the end of the file: punching part of a cluster, cutting the file beside an
// allocation, what the host's zeroes are worth, bounded steps, space that comes back by itself.
#include "lib/byte_order.h"
#include "tests/fault/scene.h"

#include <set>
#include <thread>

using namespace qlean;
using namespace qlean::fault;

namespace {

constexpr std::uint64_t kib = 1024, mib = 1024 * 1024;

/// 64 KiB clusters: guest cluster c at host cluster 4 + c.
ImagePlan usual(std::uint64_t clusters, std::uint64_t stride = 1) {
    ImagePlan plan;
    plan.cluster_bits = 16;
    plan.virtual_size = clusters * 64 * kib;
    return plan.map_all(4, stride);
}

/// 512-byte clusters: guest cluster c, of 64, at host cluster 8 + c.
Bytes full_of_small_ones() {
    ImagePlan plan;
    plan.virtual_size = 64 * 512;
    return build_image(plan.map_all(8)).bytes;
}

/// A host that is full from fill() on: a write into a hole needs a block that a punch has given back since.
class FullHost final : public FaultyFile {
  public:
    explicit FullHost(std::shared_ptr<FaultyDisk> disk) : FaultyFile(disk), end_(disk->bytes().size()) {}
    void fill() {
        full_ = true;
        room_ = 0;
    }
    void write(std::span<const std::byte> from, HostOffset at) override {
        for (std::uint64_t b = at.value / block; b <= (at.value + from.size() - 1) / block; ++b) {
            if (!hole(b))
                continue;
            if (full_ && room_ == 0)
                throw_io(ENOSPC, "the host is full");
            room_ -= full_ ? 1 : 0;
            holes_.erase(b);
            beyond_.insert(b);
        }
        FaultyFile::write(from, at);
    }
    bool zero_keeping_space(HostOffset at, std::uint64_t length) override {
        write(bytes_of(length, 0), at);
        return true;
    }
    bool punch(HostOffset at, std::uint64_t length) override {
        for (std::uint64_t b = at.value / block; b < (at.value + length) / block; ++b) {
            room_ += hole(b) ? 0 : 1;
            beyond_.erase(b);
            holes_.insert(b);
        }
        return FaultyFile::punch(at, length);
    }

  private:
    static constexpr std::uint64_t block = 4096;
    bool hole(std::uint64_t b) const { return b * block >= end_ ? !beyond_.contains(b) : holes_.contains(b); }

    std::uint64_t end_, room_ = 0;
    bool full_ = false;
    std::set<std::uint64_t> holes_, beyond_; // blocks
};

/// An image of 640 clusters of 64 KiB, 600 of them in use, on such a host, which is not full yet.
struct OnFullHost {
    explicit OnFullHost(bool extended = false) {
        ImagePlan plan;
        plan.cluster_bits = 16;
        plan.virtual_size = 640 * 64 * kib;
        plan.extended = extended;
        plan.metadata_at = 2;
        plan.map(600, 8);
        disk = std::make_shared<FaultyDisk>(build_image(plan).bytes);
        auto file = std::make_unique<FullHost>(disk);
        host = file.get();
        image = Image::open(std::move(file), {});
        image->give_back();
    }

    std::shared_ptr<FaultyDisk> disk;
    FullHost *host = nullptr;
    std::unique_ptr<Image> image;
};

} // namespace

TEST_CASE("A1: trimming or zeroing part of a cluster gives its host bytes back, and no others") {
    for (const bool trim : {true, false}) {
        const BuiltImage built = build_image(usual(4));
        Scene s(built.bytes);
        FaultyFile file(s.disk);
        const std::uint64_t before = file.allocated(), host = 5 * 64 * kib;
        if (trim)
            s.image->trim({64 * kib + 8 * kib}, 16 * kib);
        else
            s.image->zero({64 * kib + 8 * kib}, 16 * kib, Image::Zero::may_trim, false);
        CHECK(before - file.allocated() == 16 * kib);
        Bytes expected = built.bytes;
        std::fill_n(expected.begin() + static_cast<std::ptrdiff_t>(host + 8 * kib), 16 * kib, std::byte{0});
        Bytes now = s.disk->bytes();
        now.resize(9 * 64 * kib), expected.resize(now.size());
        CHECK(std::equal(now.begin() + 4 * 64 * kib, now.begin() + 8 * 64 * kib, expected.begin() + 4 * 64 * kib));
    }
}

TEST_CASE("A1: a cluster that may be shared is not punched") {
    BuiltImage built = build_image(usual(4));
    const std::uint64_t at = built.l2_entry_at(1, 16);
    built.set_word(at, built.word(at) & ~(std::uint64_t{1} << 63)); // COPIED clear
    Scene s(built.bytes);
    s.image->trim({64 * kib + 8 * kib}, 16 * kib);
    CHECK(s.disk->count(mask(Op::punch)) == 0);
    s.image->zero({64 * kib + 8 * kib}, 16 * kib, Image::Zero::may_trim, false);
    CHECK(all_are(read_some(*s.image, 72 * kib, 16 * kib), 0));
    const Bytes now = s.disk->bytes();
    CHECK(std::equal(now.begin() + 5 * 64 * kib, now.begin() + 6 * 64 * kib, built.bytes.begin() + 5 * 64 * kib));
}

TEST_CASE("A1: a write that races with the punch of its piece is not undone by it") {
    Scene s(build_image(usual(4)).bytes);
    Beside trim, write;
    Breakpoint punching(s.disk, Breakpoint::When::before, is(Op::punch));
    trim.start([&] { s.image->trim({64 * kib + 8 * kib}, 16 * kib); });
    REQUIRE(punching.wait());
    write.start([&] { s.image->write(bytes_of(4 * kib, 0x42), {64 * kib + 12 * kib}); });
    CHECK_FALSE(write.finished(a_while)); // the cluster is held exclusively
    punching.release();
    trim.join();
    write.join();
    CHECK(all_are(read_some(*s.image, 64 * kib + 12 * kib, 4 * kib), 0x42));
}

TEST_CASE("A3: cutting the file beside an allocation does not cut off what was allocated") {
    ImagePlan plan = usual(32);
    plan.virtual_size = 8 * mib;
    Scene s(build_image(plan).bytes);
    // The file grew for these and they are gone again: its tail is free.
    s.guest->write(2 * mib, 2 * mib);
    s.guest->flush();
    s.guest->trim(2 * mib, 2 * mib);
    s.image->give_back();
    Beside close, write;
    Breakpoint cutting(s.disk, Breakpoint::When::before, is(Op::truncate));
    close.start([&] {
        Allocator &a = s.image->state().allocator;
        while (a.truncate_step(mib, HostCluster{0})) {
        }
    });
    REQUIRE(cutting.wait());
    write.start([&] { s.guest->write(5 * mib, mib + 5); });
    (void)write.finished(a_while); // as far as it gets
    cutting.release();
    close.join();
    write.join();
    s.guest->flush();
    s.guest->check(0, s.image->size());
    CHECK(s.disk->length() >= s.image->state().allocator.end() * 64 * kib);
    CHECK(s.cut_everywhere(1, 2) == "");
}

TEST_CASE("A7: the file reaches past every published cluster, at every moment") {
    Scene s(empty_image(mib, 4096), 64 * 1024, false);
    s.guest->write(0, 4096);
    s.guest->zero(128 * kib, 8192, Image::Zero::keep_space);
    s.guest->write(200 * kib, 300 * kib);
    s.guest->flush();
    s.guest->zero(200 * kib, 4096, Image::Zero::keep_space);
    s.guest->write(600 * kib + 17, 1);
    s.guest->flush();
    CHECK(s.cut_everywhere(1, 3) == "");
}

TEST_CASE("A7: a freed cluster that the host would not punch is not taken for zeroes") {
    Scene s(build_image(usual(16)).bytes);
    s.disk->refuse_punch(true);
    s.image->trim({0}, mib); // all of it
    s.image->give_back();
    s.image->write(bytes_of(100, 0x11), {3 * 64 * kib + 1000}); // takes one of them for a part of a cluster
    Bytes expected(64 * kib);
    std::fill_n(expected.begin() + 1000, 100, std::byte{0x11});
    CHECK((read_some(*s.image, 3 * 64 * kib, 64 * kib) == expected));
}

TEST_CASE("A7: after a truncation that failed, what grows there is not taken for zeroes") {
    ImagePlan plan = usual(8);
    plan.virtual_size = 64 * mib;
    Scene s(build_image(plan).bytes);
    s.image->write(bytes_of(4 * mib, 0x66), {8 * mib});
    s.image->flush();
    s.image->trim({8 * mib}, 4 * mib);
    s.disk->refuse_punch(true);
    s.image->give_back();
    Fault fault;
    fault.ops = mask(Op::truncate);
    s.disk->fail(fault);
    try {
        s.image->close();
    } catch (const Error &) {
    }
    REQUIRE(s.disk->struck());
    s.disk->heal();
    // Room that was given back with the old bytes in it, a part of a cluster at a time.
    for (std::uint64_t c = 0; c < 80; ++c)
        s.image->write(bytes_of(512, 0x11), {20 * mib + c * 64 * kib});
    for (std::uint64_t c = 0; c < 80; ++c) {
        INFO("cluster " << c);
        const Bytes got = read_some(*s.image, 20 * mib + c * 64 * kib, 64 * kib);
        REQUIRE(all_are(Bytes(got.begin() + 512, got.end()), 0));
    }
}

TEST_CASE("A7: a new table on a reused cluster holds nothing of what was there") {
    // 8 KiB clusters: a table has two slices, and only one of them is touched.
    ImagePlan plan;
    plan.cluster_bits = 13;
    plan.virtual_size = 16 * mib;
    Scene s(build_image(plan.map(64, 4)).bytes);
    s.disk->refuse_punch(true);
    s.image->trim({0}, 64 * 8192);
    s.image->give_back();
    s.image->write(bytes_of(512, 1), {8 * mib}); // the second table
    s.image->flush();
    const Bytes left = s.disk->bytes();
    CHECK(judge(left).sound());
    auto again = open_image(std::make_shared<FaultyDisk>(left));
    CHECK(all_are(read_some(*again, 8 * mib + 8192, 8 * mib - 8192), 0));
}

TEST_CASE("A freed cluster is not used, punched or cut off while its old entry may be durable") {
    const std::uint64_t seed = fresh_seed();
    INFO("QLEAN_SEED=" << seed);
    Scene s(full_of_small_ones());
    s.guest->flush();
    for (int round = 0; round < 3; ++round) {
        s.guest->trim(0, 40 * 512);
        s.image->give_back();        // frees them
        s.guest->write(0, 40 * 512); // and uses them again
        if (round == 1)
            s.guest->flush();
    }
    CHECK(s.cut_everywhere(seed, 30) == "");
}

TEST_CASE("A freed cluster is free only when its lowered count is durable, in either commit that may lower it") {
    const bool at_once = GENERATE(true, false); // by the commit that unlinks it, or along with the next one
    Scene s(full_of_small_ones());
    s.guest->flush();
    const auto free = [&] {
        const auto counts = s.image->state().allocator.counts();
        return counts.free + counts.punching;
    };
    const std::uint64_t before = free();
    std::vector<std::uint64_t> at_sync; // when each began
    const int hook = s.disk->add_hook(true, [&](const Request &r) {
        if (r.op == Op::sync)
            at_sync.push_back(free());
    });
    s.image->trim({0}, 40 * 512);
    if (!at_once) {
        s.image->flush();
        s.image->trim({60 * 512}, 512);
        s.image->flush(); // lowers what the first one unlinked
    } else {
        s.image->give_back();
    }
    s.disk->remove_hook(hook);
    REQUIRE(at_sync.size() >= 3); // two of the commit that unlinks; the third covers the lowered counts
    CHECK(std::all_of(at_sync.begin(), at_sync.begin() + 3, [&](std::uint64_t n) { return n == before; }));
    CHECK(free() >= before + 40);
}

TEST_CASE("A cluster is not reused while a read of its old content is under way") {
    Scene s(full_of_small_ones());
    const Bytes old = read_some(*s.image, 0, 512);
    Beside read, trim;
    Bytes got;
    Breakpoint reading(s.disk, Breakpoint::When::before, touches(Op::read, 8 * 512, 512));
    read.start([&] { got = read_some(*s.image, 0, 512); });
    REQUIRE(reading.wait());
    trim.start([&] {
        s.image->trim({0}, 512);
        s.image->give_back();
        s.image->write(bytes_of(512, 0xee), {512 * 100 % s.image->size()});
    });
    CHECK_FALSE(trim.finished(a_while));
    reading.release();
    read.join();
    trim.join();
    CHECK((got == old));
}

TEST_CASE("B3: nothing is punched or cut off in one step of more than 32 MiB, and no more is moved and uncommitted") {
    constexpr std::uint64_t bound = 32 * mib;
    const auto disk = std::make_shared<FaultyDisk>(build_image(usual(1200, 2)).bytes);
    std::atomic<std::uint64_t> largest_punch{0}, largest_cut{0}, largest_moved{0}, since_sync{0},
        length{disk->length()};
    disk->add_hook(true, [&](const Request &r) {
        const auto raise = [](std::atomic<std::uint64_t> &most, std::uint64_t n) { most = std::max(most.load(), n); };
        if (r.op == Op::punch)
            raise(largest_punch, r.length);
        if (r.op == Op::write)
            raise(largest_moved, since_sync += r.length);
        if (r.op == Op::sync)
            since_sync = 0;
        if (r.op == Op::truncate) {
            if (r.at < length)
                raise(largest_cut, length - r.at);
            length = r.at;
        }
    });
    auto image = open_image(disk);
    MoveOwnership ownership;
    Gauges gauges;
    {
        Compact compact(*image, ownership, gauges, 1);
        (void)compact.plan({0}, image->size(), 1000);
        for (int request = 0; request < 2; ++request)
            compact.run({0}, image->size(), never); // a careless client: everything in one request
        compact.commit(never);
    }
    CHECK(gauges.moved_bytes > bound);
    CHECK(largest_moved <= bound + mib);
    CHECK(largest_cut <= bound);
    CHECK(largest_cut > 0);
    image->trim({0}, image->size());
    image->give_back();
    CHECK(largest_punch > 0);
    CHECK(largest_punch <= bound);
}

TEST_CASE(
    "B3: what is free between two that are punched goes with them, and all of it comes back, also if that fails") {
    // Every fourth cluster is in use; of what lies between nobody knows what it holds.
    ImagePlan plan;
    plan.virtual_size = 256 * 512;
    plan.metadata_at = 2;
    for (std::uint64_t c = 0; c < 200; ++c)
        plan.data[c] = 20 + c * 4;
    for (const bool fails : {false, true}) {
        const auto disk = std::make_shared<FaultyDisk>(build_image(plan).bytes);
        auto image = open_image(disk);
        Allocator &a = image->state().allocator;
        a.load_all();
        image->give_back();
        const auto kept = [&] { // every eighth of those that are trimmed, and 50 in a row
            Bytes bytes = read_some(*image, 100 * 512, 50 * 512);
            for (std::uint64_t c = 7; c < 200; c += 8) {
                const Bytes one = read_some(*image, c * 512, 512);
                bytes.insert(bytes.end(), one.begin(), one.end());
            }
            return bytes;
        };
        const Bytes before = kept();
        const std::uint64_t free = a.counts().free;
        int punches = 0;
        std::uint64_t longest = 0;
        disk->add_hook(true, [&](const Request &r) {
            if (r.op != Op::punch)
                return;
            longest = std::max(longest, r.length);
            if (++punches == 2 && fails)
                throw_io(EIO, "punching");
        });
        std::uint64_t trimmed = 0;
        for (std::uint64_t c = 0; c < 200; ++c)
            if (c % 8 != 7 && (c < 100 || c >= 150)) {
                image->trim({c * 512}, 512);
                ++trimmed;
            }
        image->state().write_back.commit(WriteBack::Give::back);
        const auto punch = [&] {
            while (a.punch_step(64 * 512)) {
            }
        };
        if (fails) {
            CHECK_THROWS_AS(punch(), Error);
            punch();
        } else {
            punch();
            // A step takes 64 of those trimmed, and of what lies between, three and three, 64 as well.
            CHECK(punches <= 3 * (64 - 64 / 3));
            CHECK(longest >= 25 * 512); // between two that are in use
        }
        CHECK(longest <= 64 * 512);
        CHECK(a.counts().free == free + trimmed);
        CHECK(a.counts().punching == 0);
        CHECK((kept() == before));
        image->close();
        CHECK(judge(disk->bytes()).clean());
    }
}

TEST_CASE("B3: nobody is handed what is being punched, nor the free clusters that go with it") {
    ImagePlan plan;
    plan.virtual_size = 64 * 512;
    plan.metadata_at = 2;
    for (std::uint64_t c = 0; c < 64; ++c)
        plan.data[c] = 20 + c * 4;
    const auto disk = std::make_shared<FaultyDisk>(build_image(plan).bytes);
    auto image = open_image(disk);
    Allocator &a = image->state().allocator;
    a.load_all();
    image->give_back();
    image->trim({0}, 32 * 512);
    image->state().write_back.commit(WriteBack::Give::back);
    std::atomic<std::uint64_t> at{0}, length{0};
    Breakpoint punch(disk, Breakpoint::When::before, [&](const Request &r) {
        if (r.op != Op::punch || r.length < 32 * 512)
            return false;
        at = r.at;
        length = r.length;
        return true;
    });
    std::thread punching([&] { a.punch_step(64 * 512); });
    REQUIRE(punch.wait()); // a punch of what was trimmed, with what lies between
    {
        const auto room = a.reserve_below(1000, {a.end()});
        CHECK(room.count() > 0);
        for (const auto &e : room.extents())
            CHECK((e.run.end().value * 512 <= at || e.run.first.value * 512 >= at + length));
    }
    punch.release();
    punching.join();
    image->state().write_back.commit(WriteBack::Give::back);
    CHECK(a.counts().punching == 0);
    image->close();
    CHECK(judge(disk->bytes()).clean());
}

TEST_CASE("B3: a guest that uses the cluster is not waited for, and waits for no cold read") {
    ImagePlan plan = usual(8, 3);
    const auto disk = std::make_shared<FaultyDisk>(build_image(plan).bytes);
    auto image = open_image(disk);
    MoveOwnership ownership;
    Gauges gauges;
    Compact compact(*image, ownership, gauges, 1);
    const auto planned = compact.plan({0}, image->size(), 100);
    REQUIRE(std::any_of(planned.begin(), planned.end(), [](const auto &p) { return p.to_do; }));
    // The last cluster lies beyond the end that is aimed at. While the mover waits for the device, the guest writes.
    const std::uint64_t at = 7 * 64 * kib, host = (4 + 7 * 3) * 64 * kib;
    disk->start_cold(true);
    {
        Beside move, write;
        Breakpoint cold(disk, Breakpoint::When::before, touches(Op::read, host, 64 * kib));
        move.start([&] { compact.run({at}, 64 * kib, never); });
        REQUIRE(cold.wait());
        write.start([&] { image->write(bytes_of(512, 0x31), {at}); });
        CHECK(write.finished(std::chrono::seconds(5)));
        cold.release();
        move.join();
        write.join();
    }
    CHECK(all_are(read_some(*image, at, 512), 0x31));
    // And while the guest reads the cluster, the mover goes on without it.
    const std::uint64_t other = 6 * 64 * kib, other_host = (4 + 6 * 3) * 64 * kib;
    disk->start_cold(false);
    Beside read, move;
    Breakpoint reading(disk, Breakpoint::When::before, touches(Op::read, other_host, 64 * kib));
    read.start([&] { (void)read_some(*image, other, 512); });
    REQUIRE(reading.wait());
    move.start([&] { compact.run({other}, 64 * kib, never); });
    CHECK(move.finished(std::chrono::seconds(5)));
    reading.release();
    read.join();
    move.join();
}

TEST_CASE("B4: a guest that trims and rewrites and never flushes does not make the file grow for ever") {
    Scene s(empty_image(mib, 4096));
    s.image->write(bytes_of(mib, 1), {0});
    const std::uint64_t after_first = s.disk->length();
    for (unsigned round = 0; round < 50; ++round) {
        s.image->trim({0}, mib);
        s.image->write(bytes_of(mib, round + 2), {0});
    }
    CHECK(s.disk->length() <= after_first + 3 * mib);
}

TEST_CASE("B4: the engine commits by itself what a client left behind") {
    ImagePlan plan = usual(64, 2);
    Scene s(build_image(plan).bytes);
    {
        Compact compact(*s.image, s.ownership, s.gauges, 1);
        (void)compact.plan({0}, s.image->size(), 1000);
        compact.run({40 * 64 * kib}, 10 * 64 * kib, never);
        CHECK(s.image->state().write_back.anything_to_commit());
    } // the connection closes
    CHECK_FALSE(s.image->state().write_back.anything_to_commit());
    CHECK_FALSE(s.ownership.owner());
    // And what nobody commits is committed after a few seconds.
    s.image->start_housekeeping();
    s.image->write(bytes_of(10, 1), {0});
    s.image->trim({64 * kib}, 64 * kib);
    CHECK(s.image->state().write_back.anything_to_commit());
    for (int i = 0; i < 80 && s.image->state().write_back.anything_to_commit(); ++i)
        std::this_thread::sleep_for(std::chrono::milliseconds(100));
    CHECK_FALSE(s.image->state().write_back.anything_to_commit());
}

TEST_CASE("B4: more than 32 MiB trimmed is given back at once, not after the interval") {
    Scene s(build_image(usual(640)).bytes);
    s.image->start_housekeeping();
    const auto began = std::chrono::steady_clock::now();
    s.image->trim({0}, 36 * mib);
    s.image->trim({36 * mib}, mib);
    while (s.disk->count(mask(Op::punch)) == 0 && std::chrono::steady_clock::now() - began < std::chrono::seconds(4))
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
    CHECK(std::chrono::steady_clock::now() - began < std::chrono::milliseconds(3500));
    CHECK(s.disk->count(mask(Op::punch)) > 0);
}

TEST_CASE(
    "B4: before the guest is told that the host is full, what is retired is given back and the write tried again") {
    Scene s(build_image(usual(16)).bytes);
    s.image->trim({0}, 8 * 64 * kib);
    Fault fault;
    fault.ops = mask(Op::truncate); // the file cannot grow any more
    fault.code = ENOSPC;
    fault.lasting = true;
    s.disk->fail(fault);
    s.image->write(bytes_of(8 * 64 * kib, 0x21), {0});
    CHECK(all_are(read_some(*s.image, 0, 8 * 64 * kib), 0x21));
    s.image->flush();
    CHECK(judge(s.disk->bytes()).sound());
}

TEST_CASE(
    "B4: on a full host what was just trimmed is punched before a writer is told so, also after a commit for it") {
    constexpr std::uint64_t size = 64 * kib;
    const OnFullHost on;
    // Few free clusters, all holes, low in the file: fewer than the writer wants, so it commits first.
    on.image->trim({0}, 8 * size);
    on.image->give_back();
    on.host->fill();
    on.image->trim({100 * size}, 40 * size);
    on.image->write(bytes_of(16 * size, 0x21), {100 * size});
    CHECK(all_are(read_some(*on.image, 100 * size, 16 * size), 0x21));
    on.image->flush();
    CHECK(judge(on.disk->bytes()).sound());
}

TEST_CASE("B4: on a full host what was just trimmed is punched before zeroes that keep their space fail") {
    constexpr std::uint64_t size = 64 * kib;
    const std::uint64_t length = GENERATE(8 * kib, 2 * size); // part of a cluster; whole ones
    const OnFullHost on(GENERATE(false, true));
    for (std::uint64_t at = 0; at < 2 * size; at += 8 * kib) // the clusters keep their places, and have holes there
        on.image->trim({at}, 8 * kib);
    on.host->fill();
    on.image->trim({100 * size}, 40 * size);
    on.image->zero({0}, length, Image::Zero::keep_space, false);
    CHECK(all_are(read_some(*on.image, 0, length), 0));
    on.image->flush();
    CHECK(judge(on.disk->bytes()).sound());
}

TEST_CASE("A punch that fails when the image is closed costs no bitmap") {
    ImagePlan plan;
    plan.cluster_bits = 16;
    plan.virtual_size = 64 * 64 * kib;
    plan.map(32, 8);
    plan.bitmaps = true;
    plan.autoclear = Header::autoclear_bitmaps;
    Scene s(build_image(plan).bytes);
    unsigned reported = 0;
    s.image->on_background_error([&](const std::exception &) { ++reported; });
    s.image->write(bytes_of(64 * kib, 7), {0});
    s.image->flush();
    s.image->trim({4 * 64 * kib}, 4 * 64 * kib);
    Fault fault;
    fault.ops = mask(Op::punch);
    fault.code = ENOSPC;
    fault.lasting = true;
    s.disk->fail(fault);
    CHECK_NOTHROW(s.image->close());
    CHECK(reported == 1);
    s.image.reset();
    const auto again = open_image(s.disk, true);
    REQUIRE(again->state().bitmaps);
    for (std::size_t i = 0; i < again->state().bitmaps->size(); ++i)
        CHECK_FALSE(again->state().bitmaps->entry(i).in_use());
    CHECK(judge(s.disk->bytes()).clean());
}

TEST_CASE("C8: the background thread of a poisoned image waits for its end and does nothing") {
    constexpr std::uint64_t size = 64 * kib;
    ImagePlan plan;
    plan.cluster_bits = 16;
    plan.virtual_size = 700 * size;
    plan.metadata_at = 2;
    plan.map(640, 8);
    Scene s(build_image(plan).bytes);
    s.image->on_background_error([](const std::exception &) {});
    s.image->start_housekeeping();
    Fault fault;
    fault.ops = mask(Op::sync);
    fault.lasting = true;
    s.disk->fail(fault);
    // More than makes it give back at once.
    s.image->trim({0}, 36 * mib);
    CHECK_THROWS_AS(s.image->flush(), Error);
    REQUIRE(s.image->state().write_back.poisoned());
    const auto used = [] {
        timespec t{};
        ::clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
        return std::chrono::seconds(t.tv_sec) + std::chrono::nanoseconds(t.tv_nsec);
    };
    const auto before = used();
    std::this_thread::sleep_for(std::chrono::seconds(1));
    CHECK(used() - before < std::chrono::milliseconds(100)); // it took all that it could get
}
