// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The rules of being QEMU's neighbour, of range locks around requests, and of poison: image locks (C4), lock
// discipline (C5), failed syncs (C8), what is durable before the first write (C9).
#include "lib/byte_order.h"
#include "lib/create.h"
#include "lib/image_lock.h"
#include "tests/fault/scene.h"

#include <cstdlib>
#include <fcntl.h>
#include <fstream>
#include <set>
#include <sys/xattr.h>
#include <thread>
#include <unistd.h>

using namespace qlean;
using namespace qlean::fault;

namespace {

std::atomic<bool> syncs_fail{false};

} // namespace

/// In place of the C library's: a kernel that fails on request.
extern "C" int fdatasync(int fd) {
    if (!syncs_fail)
        return ::fsync(fd);
    errno = EIO;
    return -1;
}

namespace {

struct SyncsFail {
    SyncsFail() { syncs_fail = true; }
    ~SyncsFail() { syncs_fail = false; }
};

constexpr std::uint64_t cluster = 512;

/// An image in a real file, for what only the kernel knows.
struct RealFile {
    explicit RealFile(const Bytes &bytes) {
        const char *directory = std::getenv("TMPDIR");
        path = std::string(directory ? directory : "/tmp") + "/qlean-rules-XXXXXX";
        ::close(::mkstemp(path.data()));
        std::ofstream(path, std::ios::binary)
            .write(reinterpret_cast<const char *>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    }
    ~RealFile() { ::unlink(path.c_str()); }
    std::string path;
};

/// The bytes of the file on which somebody holds a lock that conflicts with `type`.
std::set<int> locked(const std::string &path, short type) {
    const int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
    std::set<int> found;
    for (int at = 90; at < 220; ++at) {
        struct flock lock {};
        lock.l_type = type;
        lock.l_whence = SEEK_SET;
        lock.l_start = at;
        lock.l_len = 1;
        REQUIRE(::fcntl(fd, F_OFD_GETLK, &lock) == 0);
        if (lock.l_type != F_UNLCK)
            found.insert(at);
    }
    ::close(fd);
    return found;
}

/// Holds a read lock on one byte, as QEMU does.
struct Neighbour {
    Neighbour(const std::string &path, int at) : fd(::open(path.c_str(), O_RDWR | O_CLOEXEC)) {
        struct flock lock {};
        lock.l_type = F_RDLCK;
        lock.l_whence = SEEK_SET;
        lock.l_start = at;
        lock.l_len = 1;
        REQUIRE(::fcntl(fd, F_OFD_SETLK, &lock) == 0);
    }
    ~Neighbour() { ::close(fd); }
    int fd;
};

/// 64 guest clusters, all mapped, from host cluster 8 on.
Bytes full_image() {
    ImagePlan plan;
    plan.virtual_size = 64 * cluster;
    return build_image(plan.map_all(8)).bytes;
}

Error::Kind kind_of_failure(const std::function<void()> &f) {
    try {
        f();
    } catch (const Error &error) {
        return error.kind();
    }
    throw std::runtime_error("it did not fail");
}

} // namespace

TEST_CASE("C4: the image locks are QEMU's: read locks on 100, 101, 103, 201, 203; never 200, never write locks") {
    const RealFile file(empty_image(1 << 20, 65536));
    {
        const auto image = Image::open(file.path, {});
        CHECK(locked(file.path, F_WRLCK) == std::set<int>{100, 101, 103, 201, 203});
        CHECK(locked(file.path, F_RDLCK).empty());
        CHECK(kind_of_failure([&] { (void)Image::open(file.path, {}); }) == Error::Kind::busy);
        Image::Options reading;
        reading.read_only = true;
        CHECK(kind_of_failure([&] { (void)Image::open(file.path, reading); }) == Error::Kind::busy);
        CHECK(locked(file.path, F_WRLCK) == std::set<int>{100, 101, 103, 201, 203}); // those that failed left nothing
    }
    CHECK(locked(file.path, F_WRLCK).empty());
    Image::Options reading;
    reading.read_only = true;
    const auto first = Image::open(file.path, reading);
    CHECK(locked(file.path, F_WRLCK) == std::set<int>{100, 201, 203});
    CHECK(locked(file.path, F_RDLCK).empty());
    const auto second = Image::open(file.path, reading); // readers share
    CHECK(kind_of_failure([&] { (void)Image::open(file.path, {}); }) == Error::Kind::busy);
}

TEST_CASE("C4: what a neighbour holds decides whether the image may be opened") {
    const RealFile file(empty_image(1 << 20, 65536));
    for (const int at : {100, 101, 103, 200, 201, 203}) {
        const Neighbour neighbour(file.path, at);
        INFO("a neighbour holds " << at);
        Image::Options reading;
        reading.read_only = true;
        const bool stops_writer = at != 100, stops_reader = at == 200 || at == 101 || at == 103;
        if (stops_writer)
            CHECK(kind_of_failure([&] { (void)Image::open(file.path, {}); }) == Error::Kind::busy);
        else
            CHECK_NOTHROW(Image::open(file.path, {}));
        if (stops_reader)
            CHECK(kind_of_failure([&] { (void)Image::open(file.path, reading); }) == Error::Kind::busy);
        else
            CHECK_NOTHROW(Image::open(file.path, reading));
    }
}

TEST_CASE("C4: a child process does not inherit the locks") {
    const RealFile file(empty_image(1 << 20, 65536));
    const auto posix = PosixFile::open(file.path, PosixFile::Access::read_write);
    CHECK((::fcntl(posix->descriptor(), F_GETFD) & FD_CLOEXEC) != 0);
}

TEST_CASE("C5: block status waits for a write of the same cluster, and sees it whole") {
    ImagePlan plan;
    plan.virtual_size = 64 * cluster;
    plan.data[0] = 8;
    Scene s(build_image(plan).bytes);
    Beside write, status;
    std::vector<Image::Extent> extents;
    Breakpoint writing(s.disk, Breakpoint::When::before,
                       [](const Request &r) { return r.op == Op::write && r.length == 4 * cluster; });
    write.start([&] { s.image->write(bytes_of(4 * cluster, 1), {10 * cluster}); });
    REQUIRE(writing.wait());
    status.start([&] { extents = s.image->extents({8 * cluster}, 8 * cluster, 100); });
    CHECK_FALSE(status.finished(a_while));
    writing.release();
    write.join();
    status.join();
    REQUIRE(extents.size() == 3);
    CHECK(extents[1].at.value == 10 * cluster);
    CHECK(extents[1].length == 4 * cluster);
    CHECK(extents[1].allocated);
}

TEST_CASE("C5: requests larger than all stripes, by many threads, in every direction, do not lock up") {
    Scene s(empty_image(8 << 20, 512));
    std::vector<std::unique_ptr<Beside>> actors;
    for (unsigned i = 0; i < 4; ++i)
        actors.emplace_back(std::make_unique<Beside>())->start([&, i] {
            std::mt19937_64 random(i);
            for (int n = 0; n < 12; ++n) {
                const std::uint64_t at = random() % (4 << 20);
                if (i % 2)
                    (void)read_some(*s.image, at, 4 << 20);
                else if (n % 3 == 0)
                    s.image->trim({at}, 4 << 20);
                else
                    s.image->write(bytes_of(random() % 300000 + 1, i), {at});
            }
        });
    for (auto &actor : actors)
        CHECK(actor->finished(std::chrono::seconds(60)));
    s.image->flush();
    CHECK(judge(s.disk->bytes()).sound());
}

TEST_CASE("C8: after a failed sync nothing is accepted, freed, punched, cut or marked clean") {
    Scene s(full_image());
    s.image->trim({0}, 20 * cluster);
    bool told = false;
    s.image->state().write_back.on_poison([&] { told = true; });
    Fault fault;
    fault.ops = mask(Op::sync);
    s.disk->fail(fault);
    CHECK(kind_of_failure([&] { s.image->flush(); }) == Error::Kind::io);
    CHECK(told);
    const auto before = s.disk->recorded();
    CHECK(kind_of_failure([&] { s.image->flush(); }) == Error::Kind::denied);
    CHECK(kind_of_failure([&] { s.image->write(bytes_of(10, 1), {40 * cluster}); }) == Error::Kind::denied);
    CHECK(kind_of_failure([&] { s.image->trim({0}, cluster); }) == Error::Kind::denied);
    CHECK(kind_of_failure([&] { s.image->zero({0}, cluster, Image::Zero::keep_space, false); }) == Error::Kind::denied);
    CHECK(kind_of_failure([&] { s.image->give_back(); }) == Error::Kind::denied);
    CHECK(kind_of_failure([&] {
              Compact compact(*s.image, s.ownership, s.gauges, 1);
              (void)compact.plan({0}, s.image->size(), 10);
              compact.run({0}, s.image->size(), never);
          }) == Error::Kind::denied);
    s.image->start_housekeeping();
    s.image->close();
    CHECK(s.disk->recorded() == before);
    CHECK(all_are(read_some(*s.image, 0, 10 * cluster), 0)); // reading goes on
}

TEST_CASE("C8: punching and cutting in the background stop with the poison as well") {
    Scene s(full_image());
    s.image->trim({0}, 60 * cluster);
    s.image->state().write_back.commit(WriteBack::Give::back); // freed, but not punched yet
    Fault fault;
    fault.ops = mask(Op::sync);
    s.disk->fail(fault);
    CHECK_THROWS_AS(s.image->flush(), Error);
    CHECK_FALSE(s.image->state().allocator.punch_step(1 << 20));
    CHECK_FALSE(s.image->state().allocator.truncate_step(1 << 20, HostCluster{0}));
    CHECK(s.disk->count(mask(Op::punch)) == 0);
}

TEST_CASE("C8: a failed sync is remembered with the file, and forgotten once the next server distrusted its cache") {
    const RealFile file(empty_image(1 << 20, 65536));
    {
        const auto posix = PosixFile::open(file.path, PosixFile::Access::read_write);
        posix->remember_failed_sync(true);
        if (!posix->had_failed_sync()) {
            WARN("this file system has no user attributes; not tested");
            return;
        }
    }
    (void)Image::open(file.path, {});
    CHECK_FALSE(PosixFile::open(file.path, PosixFile::Access::read_write)->had_failed_sync());
    // Whoever syncs: a repair does so before there is an image that could be poisoned.
    const auto posix = PosixFile::open(file.path, PosixFile::Access::read_write);
    const SyncsFail fail;
    CHECK_THROWS_AS(posix->sync(), Error);
    CHECK(posix->had_failed_sync());
}

TEST_CASE("C9: autoclear bits are cleared, durably, before anything else of the image changes") {
    const auto first_changes = std::vector<std::pair<const char *, std::function<void(Scene &)>>>{
        {"write", [](Scene &s) { s.image->write(bytes_of(10, 1), {0}); }},
        {"write in place", [](Scene &s) { s.image->write(bytes_of(10, 1), {5 * cluster}); }},
        {"trim", [](Scene &s) { s.image->trim({0}, 20 * cluster); }},
        {"zero", [](Scene &s) { s.image->zero({0}, 20 * cluster, Image::Zero::keep_space, false); }},
        {"compaction", [](Scene &s) { compact_all(*s.image); }},
        {"zero scan", [](Scene &s) { zero_scan_all(*s.image); }},
    };
    for (const auto &[name, change] : first_changes) {
        INFO(name);
        ImagePlan plan;
        plan.virtual_size = 64 * cluster;
        for (std::uint64_t c = 2; c < 40; ++c)
            plan.data[c] = 8 + 3 * c;
        plan.autoclear = 0xc; // bits that nobody knows
        BuiltImage built = build_image(plan);
        std::fill_n(built.bytes.begin() + static_cast<std::ptrdiff_t>((8 + 3 * 7) * cluster), cluster, std::byte{0});
        Scene s(built.bytes, 64 * 1024, false);
        change(s);
        s.image->flush();
        s.image.reset();
        const auto &events = s.disk->events();
        const auto data = std::find_if(events.begin(), events.end(), [](const Event &e) {
            return e.kind == Event::Kind::write || e.kind == Event::Kind::zeroes || e.kind == Event::Kind::length;
        });
        REQUIRE(data != events.end());
        REQUIRE(data->kind == Event::Kind::write);
        CHECK(data->at == 0);
        CHECK(load_be<std::uint64_t>(data->bytes, 88) == 0);
        CHECK((data + 1)->kind == Event::Kind::sync_began);
        CHECK((data + 2)->kind == Event::Kind::sync_ended);
    }
}

TEST_CASE("C9: whatever the first change is, the enabled bitmap has it") {
    using How = Image::Zero;
    const unsigned bits = GENERATE(9, 14); // parts of the larger ones can be punched
    const std::uint64_t size = std::uint64_t{1} << bits;
    const std::vector<std::pair<const char *, std::function<void(Image &)>>> changes = {
        {"write", [=](Image &i) { i.write(bytes_of(10, 1), {5 * size + 7}); }},
        {"write of what is not mapped", [=](Image &i) { i.write(bytes_of(10, 1), {50 * size}); }},
        {"trim", [=](Image &i) { i.trim({4 * size}, 20 * size); }},
        {"trim within a cluster", [=](Image &i) { i.trim({4 * size + 9}, size - 100); }},
        {"trim across two", [=](Image &i) { i.trim({4 * size + 9}, size); }},
        {"zero", [=](Image &i) { i.zero({4 * size}, 20 * size, How::may_trim, false); }},
        {"zero within a cluster", [=](Image &i) { i.zero({4 * size + 9}, size - 100, How::may_trim, false); }},
        {"zero that keeps space", [=](Image &i) { i.zero({4 * size}, 20 * size, How::keep_space, false); }},
        {"the same across two", [=](Image &i) { i.zero({4 * size + 9}, size, How::keep_space, false); }},
        {"fast zero", [=](Image &i) { i.zero({4 * size}, 20 * size, How::may_trim, true); }}};
    ImagePlan plan;
    plan.cluster_bits = bits;
    plan.virtual_size = 64 * size;
    plan.map(40, 8);
    plan.metadata_at = 60;
    plan.bitmaps = true;
    const Bytes before = build_image(plan).bytes;
    for (const auto &[name, change] : changes) {
        INFO(name);
        const auto disk = std::make_shared<FaultyDisk>(before);
        auto image = open_image(disk);
        change(*image);
        const Bytes now = read_all(*image);
        image->close();
        CHECK(judge_bitmaps(disk->bytes(), before).value_or("") == "");
        CHECK(has_consistent_bitmap(disk->bytes()));
        CHECK((guest_bytes(disk->bytes()) == now));
        CHECK(judge(disk->bytes()).clean());
    }
}

TEST_CASE("C9: opening and reading changes nothing, autoclear bits included") {
    ImagePlan plan;
    plan.autoclear = 0xc;
    plan.map_all(8);
    const BuiltImage built = build_image(plan);
    Scene s(built.bytes, 64 * 1024, false);
    (void)read_all(*s.image);
    (void)s.image->extents({0}, s.image->size(), 1000);
    s.image->prefetch({0}, s.image->size());
    s.image.reset();
    CHECK((s.disk->bytes() == built.bytes));
}

TEST_CASE("C9: an image that was only read and flushed is not changed by the shutdown either") {
    // With the widest refcounts the table of a small image has to grow to link blocks ahead, and leaves the old one.
    for (const unsigned order : {0u, 4u, 6u}) {
        CreateOptions options;
        options.virtual_size = 1 << 20;
        options.cluster_size = 512;
        options.refcount_order = order;
        auto disk = std::make_shared<FaultyDisk>();
        FaultyFile file(disk);
        create_image(file, options);
        const Bytes before = disk->bytes();
        auto image = open_image(disk);
        (void)read_all(*image);
        image->flush();
        image->close();
        INFO("refcounts of " << (1u << order) << " bits");
        CHECK((disk->bytes() == before));
    }
}

TEST_CASE("C9: the corrupt bit is refused; it and the dirty bit are never set") {
    BuiltImage built = build_image(ImagePlan{});
    built.set_word(72, 2);
    CHECK_THROWS_AS(open_image(std::make_shared<FaultyDisk>(built.bytes)), Error);
    Scene s(build_image(ImagePlan{}).bytes);
    s.guest->write(0, 5000);
    s.guest->flush();
    s.image.reset();
    for (const Event &e : s.disk->events())
        if (e.kind == Event::Kind::write && e.at == 0)
            CHECK(load_be<std::uint64_t>(e.bytes, 72) == 0);
    CHECK(load_be<std::uint64_t>(s.disk->bytes(), 72) == 0);
}

TEST_CASE("C9: the part of a cluster at the end of the disk counts as whole") {
    for (const unsigned version : {2u, 3u}) {
        Scene s(empty_image(10 * 4096 + 1000, 4096, version));
        s.guest->write(9 * 4096, 4096 + 1000);
        s.guest->flush();
        s.guest->trim(10 * 4096, 1000); // the whole rest
        s.image->give_back();
        std::vector<Mapping> mappings(11);
        s.image->state().mapper.resolve({0}, mappings);
        CHECK(mappings[9].kind == Mapping::Kind::data);
        CHECK_FALSE(mappings[10].has_host());
        s.guest->check(0, s.image->size());
        s.guest->zero(9 * 4096 + 5, 4096 + 995, Image::Zero::may_trim);
        s.guest->check(0, s.image->size());
        s.guest->flush();
        CHECK(judge(s.disk->bytes()).sound());
    }
}

TEST_CASE("A refcount of one with the COPIED flag clear is safe: the first write copies") {
    ImagePlan plan;
    plan.virtual_size = 64 * cluster;
    plan.map_all(8);
    BuiltImage built = build_image(plan);
    for (const std::uint64_t c : {3, 4, 5}) {
        const std::uint64_t at = built.l2_entry_at(c);
        built.set_word(at, built.word(at) & ~(std::uint64_t{1} << 63));
    }
    Scene s(built.bytes);
    s.guest->write(3 * cluster + 100, 50);
    s.guest->zero(4 * cluster, cluster, Image::Zero::keep_space);
    s.guest->trim(5 * cluster, cluster);
    s.guest->flush();
    s.guest->check(0, s.image->size());
    const Bytes now = s.disk->bytes();
    CHECK(std::equal(now.begin() + 11 * 512, now.begin() + 12 * 512, built.bytes.begin() + 11 * 512)); // left alone
    CHECK(judge(now).sound());
    CHECK(s.cut_everywhere(1, 4) == "");
}

TEST_CASE("A close waits for whoever gives back at that moment, and nothing reaches the file after it") {
    ImagePlan plan;
    plan.virtual_size = 64 * 512;
    plan.map_all(20);
    Scene s(build_image(plan).bytes);
    Beside giving, closing;
    Breakpoint punch(s.disk, Breakpoint::When::before, [](const Request &r) { return r.op == Op::punch; });
    s.image->trim({0}, 16 * 512);
    giving.start([&] { s.image->give_back(); });
    REQUIRE(punch.wait());
    closing.start([&] { s.image->close(); });
    CHECK_FALSE(closing.finished(std::chrono::milliseconds(200)));
    punch.release();
    giving.join();
    closing.join();
    const auto changes = s.disk->count(any_change);
    CHECK_NOTHROW(s.image->give_back());
    CHECK(s.disk->count(any_change) == changes);
    CHECK(judge(s.disk->bytes()).clean());
}
