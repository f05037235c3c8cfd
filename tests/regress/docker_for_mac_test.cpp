// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// What users of Docker for Mac met (2016-17): the first online compaction of QCOW2 images that many people used.
// Numbers are issues of docker/for-mac.
#include "tests/regress/rig.h"

#include "lib/byte_order.h"
#include "lib/create.h"
#include "lib/posix_file.h"

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <mutex>

using namespace qlean;
using namespace qlean::fault;

namespace {

constexpr std::uint64_t cluster = 65536;

/// 64 clusters of 64 KiB, of which the first 48 lie far beyond where they should be. Locks are per cluster here.
Bytes far_away() {
    ImagePlan plan;
    plan.cluster_bits = 16;
    plan.virtual_size = 64 * cluster;
    return build_image(plan.map(48, 70)).bytes;
}

/// Something the guest does while somebody else is stuck: it must not be stuck, too. `unstick` lets a test end that
/// fails.
void proceeds(const std::function<void()> &guest, Breakpoint &unstick) {
    Beside request;
    request.start(guest);
    const bool finished = request.finished(patience);
    CHECK(finished);
    if (!finished)
        unstick.release();
    request.join();
}

} // namespace

TEST_CASE("docker/for-mac#371: while a move is stuck in its copy, the guest goes on with every other cluster") {
    Rig rig(far_away());
    const auto compact = rig.connect();
    compact->plan({0}, rig.image->size(), all_of_it);
    Beside mover;
    Breakpoint in_copy(rig.disk, Breakpoint::When::after, touches(Op::read, rig.host_of(5), cluster));
    mover.start([&] { compact->run({0}, rig.image->size(), go_on); });
    REQUIRE(in_copy.wait());
    proceeds([&] { rig.must_read(20 * cluster, 2 * cluster); }, in_copy);
    proceeds([&] { rig.write(4 * cluster + 100, 1000, 1); }, in_copy);  // moved already
    proceeds([&] { rig.write(6 * cluster, 2 * cluster, 2); }, in_copy); // about to be
    proceeds([&] { rig.write(50 * cluster + 7, 100000, 3); }, in_copy); // new clusters
    proceeds([&] { rig.trim(30 * cluster, 3 * cluster); }, in_copy);
    proceeds([&] { rig.image->flush(); }, in_copy);
    CHECK_FALSE(mover.finished());
    in_copy.release();
    mover.join();
    compact->commit(go_on);
    rig.finish();
}

TEST_CASE("docker/for-mac#371: a write of the cluster that is being moved waits for the copy of that one cluster") {
    Rig rig(far_away());
    const auto compact = rig.connect();
    compact->plan({0}, rig.image->size(), all_of_it);
    Beside mover, guest;
    Breakpoint in_copy(rig.disk, Breakpoint::When::after, touches(Op::read, rig.host_of(5), cluster));
    Breakpoint in_next(rig.disk, Breakpoint::When::before, touches(Op::read, rig.host_of(6), cluster));
    mover.start([&] { compact->run({0}, rig.image->size(), go_on); });
    REQUIRE(in_copy.wait());
    guest.start([&] { rig.write(5 * cluster + 1000, 5000, 9); });
    CHECK_FALSE(guest.finished(a_while)); // it would be lost: the copy has been read
    in_copy.release();
    REQUIRE(in_next.wait());
    CHECK(guest.finished(patience));
    CHECK_FALSE(mover.finished());
    in_next.release();
    mover.join();
    guest.join();
    compact->commit(go_on);
    rig.finish();
}

TEST_CASE("docker/for-mac#371: the guest goes on through every sync of compaction") {
    Rig rig(far_away());
    std::vector<std::unique_ptr<Beside>> requests;
    std::uint64_t next = 0, stuck = 0;
    const auto leader = std::this_thread::get_id();
    const int hook = rig.disk->add_hook(true, [&](const Request &r) {
        if (r.op != Op::sync || std::this_thread::get_id() != leader)
            return;
        const std::uint64_t c = next++ * 5 % 40;
        requests.push_back(std::make_unique<Beside>());
        requests.back()->start([&, c] {
            rig.write(c * cluster + 10, 3000, 100 + static_cast<unsigned>(c)); // in place
            rig.must_read(c * cluster, cluster);
            if (c % 3 == 0)
                rig.trim((40 + c % 8) * cluster, cluster);
        });
        stuck += !requests.back()->finished(patience);
    });
    CHECK(rig.compact() > 0);
    rig.disk->remove_hook(hook);
    for (auto &request : requests)
        CHECK_NOTHROW(request->join());
    CHECK(requests.size() > 5);
    CHECK(stuck == 0);
    rig.finish();
}

TEST_CASE("docker/for-mac#1880: a move that waits for a slow device keeps nobody waiting, not even for its cluster") {
    Rig rig(far_away());
    const auto compact = rig.connect();
    compact->plan({0}, rig.image->size(), all_of_it);
    rig.disk->start_cold(true);
    Beside mover;
    Breakpoint in_device(rig.disk, Breakpoint::When::after, touches(Op::read, rig.host_of(5), cluster));
    mover.start([&] { compact->run({0}, rig.image->size(), go_on); });
    REQUIRE(in_device.wait());
    proceeds([&] { rig.must_read(5 * cluster, cluster); }, in_device);
    proceeds([&] { rig.write(5 * cluster + 3, 40000, 77); }, in_device); // after the mover has read the old bytes
    proceeds([&] { rig.image->flush(); }, in_device);
    CHECK_FALSE(mover.finished());
    in_device.release();
    mover.join();
    compact->commit(go_on);
    rig.finish();
}

TEST_CASE("docker/for-mac#1880: a flush of the guest never has more than one MiB of moves to make durable") {
    Rig rig(far_away());
    std::uint64_t uncommitted = 0, most = 0, syncs = 0;
    std::mutex counting; // space is given back beside the moves
    const int hook = rig.disk->add_hook(true, [&](const Request &r) {
        const std::lock_guard guard(counting);
        if (r.op == Op::sync) {
            uncommitted = 0;
            ++syncs;
        } else if (r.op == Op::write && r.length == cluster) {
            most = std::max(most, uncommitted += r.length);
        }
    });
    const auto compact = rig.connect();
    compact->plan({0}, rig.image->size(), all_of_it);
    compact->run({0}, rig.image->size(), go_on); // all 48 in one request
    rig.disk->remove_hook(hook);
    {
        const std::lock_guard guard(counting);
        CHECK(most >= cluster);
        CHECK(most <= 1024 * 1024 + cluster); // the L2 table moves along
        CHECK(syncs > 2);
    }
    compact->commit(go_on);
    rig.finish();
}

TEST_CASE("docker/for-mac#1880: compaction comes to an end although the guest writes between all of its steps") {
    Rig rig(far_away());
    std::mt19937_64 random(1880);
    const std::uint64_t before = rig.disk->length();
    const int passes = rig.compact([&] {
        for (int i = 0; i < 4; ++i)
            rig.write(random() % 47 * cluster + random() % cluster, 1 + random() % cluster, 1 + random() % 255);
        rig.image->flush();
    });
    CHECK(passes > 0);
    CHECK(passes <= 4);
    CHECK(rig.disk->length() < before / 2);
    rig.finish();
}

TEST_CASE("docker/for-mac#1147: two processes do not edit one image") {
    std::string path = std::string(std::getenv("TMPDIR") ? std::getenv("TMPDIR") : "/tmp") + "/qlean-regress-XXXXXX";
    const int fd = ::mkstemp(path.data());
    REQUIRE(fd != -1);
    ::close(fd);
    ::unlink(path.c_str());
    {
        const auto file = PosixFile::create(path);
        CreateOptions options;
        options.virtual_size = 1024 * 1024;
        create_image(*file, options);
    }
    enum Answer { opened = 10, busy, other };
    const auto ask = [&](bool read_only) {
        Image::Options options;
        options.read_only = read_only;
        try {
            Image::open(path, options);
            return opened;
        } catch (const Error &error) {
            return error.kind() == Error::Kind::busy ? busy : other;
        }
    };
    const auto ask_another_process = [&](bool read_only) {
        const pid_t child = ::fork();
        if (child == 0)
            ::_exit(ask(read_only));
        int status = 0;
        ::waitpid(child, &status, 0);
        return WIFEXITED(status) ? WEXITSTATUS(status) : 0;
    };
    CHECK(ask_another_process(false) == opened);
    {
        const auto image = Image::open(path, {});
        image->write(bytes_of(100000, 5), {4096});
        CHECK(ask_another_process(false) == busy);
        CHECK(ask_another_process(true) == busy);
        CHECK(ask(false) == busy); // the same process has no privilege
        // The bug of #1147: locks of the process, not of the open file, vanish when any descriptor of it is closed.
        ::close(::open(path.c_str(), O_RDWR | O_CLOEXEC));
        CHECK(ask_another_process(false) == busy);
        // A child that inherits the descriptor keeps the lock until both are gone.
        image->close();
        CHECK(ask_another_process(false) == busy);
    }
    CHECK(ask_another_process(false) == opened);
    {
        const auto image = Image::open(path, {});
        CHECK(all_are(read_some(*image, 4096, 100000), 5));
        const auto file = PosixFile::open(path, PosixFile::Access::read_only);
        Bytes bytes(file->length());
        file->read(bytes, HostOffset{0});
        CHECK(judge(bytes).clean());
    }
    ::unlink(path.c_str());
}

TEST_CASE("docker/for-mac#1315: whenever the power fails, nothing refers outside the file that has shrunk") {
    ImagePlan plan;
    plan.cluster_bits = 12;
    plan.virtual_size = 48 * 4096;
    for (std::uint64_t c = 0; c < 48; ++c)
        plan.data[c] = 20 + (c * 29 + 5) % 101; // in no order, with gaps
    const std::uint64_t seed = fresh_seed();
    INFO("QLEAN_SEED=" << seed);
    Scene scene(build_image(plan).bytes);
    const std::uint64_t before = scene.disk->length();
    RecordedGuest::Mix mix;
    mix.most = 3 * 4096;
    compact_all(*scene.image, [&] { scene.guest->step(mix); });
    scene.guest->trim(8 * 4096, 24 * 4096);
    compact_all(*scene.image, [&] { scene.guest->step(mix); });
    scene.guest->trim(8 * 4096, 24 * 4096);
    compact_all(*scene.image); // with nobody who makes the file grow again
    scene.guest->flush();
    CHECK(scene.disk->length() < before / 2);
    CHECK(scene.cut_everywhere(seed, 2) == "");
    const Bytes bytes = scene.disk->bytes();
    INFO(judge(bytes).text());
    CHECK(judge(bytes).sound());
    CHECK((guest_bytes(bytes) == scene.guest->now()));
}

TEST_CASE("docker/for-mac#1315: an image that refers outside its file is refused, and stays as it is") {
    const BuiltImage built = build_image([] {
        ImagePlan plan;
        plan.virtual_size = 64 * 512;
        plan.metadata_at = 4;
        return plan.map_all(20);
    }());
    Bytes cut = built.bytes;
    cut.resize(cut.size() - 3 * 512);
    refused(cut, "truncated");
    // A table that lies outside.
    BuiltImage table = built;
    table.set_word(table.l1, (std::uint64_t{1} << 63) | (built.bytes.size() + 512));
    refused(table.bytes, "L2 table");
}

TEST_CASE("docker/for-mac 0.7.2: discarding and punching never take a refcount, or anything else that is in use") {
    ImagePlan plan;
    plan.cluster_bits = 12;
    plan.virtual_size = 256 * 4096;
    plan.metadata_at = 100; // in the middle of the data
    for (std::uint64_t c = 0; c < 200; ++c)
        plan.data[c] = c < 90 ? 4 + c : 20 + c;
    Rig rig(build_image(plan).bytes);
    std::mt19937_64 random(72);
    PunchGuard guard(rig.disk);
    for (int round = 0; round < 40; ++round) {
        const std::uint64_t c = random() % 250, n = 1 + random() % std::min<std::uint64_t>(256 - c, 60);
        if (round % 2 == 0)
            rig.trim(c * 4096, n * 4096);
        else
            rig.write(c * 4096, n * 4096, 1 + random() % 255);
        if (round % 3 == 0)
            rig.image->give_back();
        if (round % 10 == 9)
            CHECK(rig.compact() > 0);
    }
    rig.trim(0, 250 * 4096);
    CHECK(rig.compact() > 0);
    CHECK(guard.seen() > 10);
    CHECK(guard.text() == "");
    rig.finish();
}

TEST_CASE("docker/for-mac#1052: clusters shared with snapshots survive compaction with all their referrers") {
    ImagePlan plan;
    plan.virtual_size = 64 * 1024;
    plan.map_all(120, 2);
    const Bytes before = with_snapshot(with_snapshot(build_image(plan).bytes, "one"), "two");
    Rig rig(before);
    PunchGuard guard(rig.disk);
    rig.write(3000, 5000, 7);
    rig.trim(20 * 512, 30 * 512);
    CHECK(rig.compact() > 0);
    rig.write(30 * 512, 512, 9);
    rig.image->flush();
    CHECK(rig.compact() > 0);
    CHECK(guard.text() == "");
    CHECK((snapshot_disks(rig.disk->bytes()) == snapshot_disks(before)));
    CHECK(rig.disk->length() < before.size() * 2 / 3);
    rig.finish();
}

TEST_CASE("docker/for-mac#1052: a cluster that two entries share without a snapshot stops compaction") {
    // Without a snapshot table: a cluster that two entries share stops compaction before anything has moved.
    BuiltImage shared = build_image(ImagePlan{}.map_all(40));
    shared.set_word(shared.l2_entry_at(7), shared.word(shared.l2_entry_at(8)) & ~(std::uint64_t{1} << 63));
    shared.set_word(shared.l2_entry_at(8), shared.word(shared.l2_entry_at(7)));
    const auto disk = std::make_shared<FaultyDisk>(shared.bytes);
    const auto image = open_image(disk);
    MoveOwnership ownership;
    Gauges gauges;
    Compact compact(*image, ownership, gauges, 1);
    CHECK(said([&] { compact.run({0}, image->size(), go_on); }).find("used twice") != std::string::npos);
    CHECK(said([&] { compact.commit(go_on); }).find("used twice") != std::string::npos);
    CHECK((guest_bytes(disk->bytes()) == guest_bytes(shared.bytes)));
}
