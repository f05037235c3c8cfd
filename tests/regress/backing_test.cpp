// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Bugs by which data of a backing file was lost, or came back. The overlay is on a faulty disk; what lies below it is a
// raw file of the host that is nowhere zero.
#include "tests/regress/rig.h"

#include "lib/byte_order.h"

#include <cstring>
#include <filesystem>
#include <fstream>
#include <unistd.h>

using namespace qlean;
using namespace qlean::fault;

namespace {

/// A raw file full of bytes that no test writes, and are not zero; after them a hole.
class Below {
  public:
    explicit Below(std::uint64_t full, std::uint64_t hole = 0) : bytes(full + hole) {
        static std::atomic<unsigned> number{0};
        path_ = std::filesystem::temp_directory_path() / fmt::format("qlean-below-{}-{}", ::getpid(), ++number);
        for (std::uint64_t i = 0; i < full; ++i)
            bytes[i] = std::byte(0x80 + (i / 512 + i) % 0x7f);
        std::ofstream(path_, std::ios::binary)
            .write(reinterpret_cast<const char *>(bytes.data()), static_cast<std::streamsize>(full));
        std::filesystem::resize_file(path_, full + hole);
    }
    ~Below() { std::filesystem::remove(path_); }
    std::string path() const { return path_.string(); }

    Bytes bytes;

  private:
    std::filesystem::path path_;
};

/// An overlay of `size` bytes with nothing in it.
struct Backed {
    Backed(std::uint64_t size, std::uint64_t below_size, std::uint64_t cluster, unsigned version = 3,
           std::uint64_t hole_below = 0)
        : below(below_size, hole_below) {
        Bytes built = empty_image(size, cluster, version);
        const std::string name = below.path();
        constexpr std::uint64_t at = 256;
        REQUIRE(at + name.size() <= cluster);
        std::memcpy(built.data() + at, name.data(), name.size());
        store_be<std::uint64_t>(std::span(built), 8, at);
        store_be<std::uint32_t>(std::span(built), 16, static_cast<std::uint32_t>(name.size()));
        disk = std::make_shared<FaultyDisk>(std::move(built));
        model = below.bytes;
        model.resize(size);
        image = open_image(disk);
    }

    void write(std::uint64_t at, std::uint64_t length, unsigned value) {
        image->write(bytes_of(length, value), {at});
        std::fill_n(model.begin() + static_cast<std::ptrdiff_t>(at), length, std::byte(value));
    }
    void zero(std::uint64_t at, std::uint64_t length, Image::Zero how = Image::Zero::may_trim) {
        image->zero({at}, length, how, false);
        std::fill_n(model.begin() + static_cast<std::ptrdiff_t>(at), length, std::byte{0});
    }
    /// Each byte of the range is what it was, or zero; the model has what is there then.
    void trim(std::uint64_t at, std::uint64_t length) {
        image->trim({at}, length);
        const Bytes now = read_some(*image, at, length);
        bool allowed = true;
        for (std::uint64_t i = 0; i < length; ++i)
            allowed = allowed && (now[i] == model[at + i] || now[i] == std::byte{0});
        CHECK(allowed);
        std::copy(now.begin(), now.end(), model.begin() + static_cast<std::ptrdiff_t>(at));
    }
    bool reads_right(std::uint64_t at, std::uint64_t length) {
        const Bytes bytes = read_some(*image, at, length);
        return std::equal(bytes.begin(), bytes.end(), model.begin() + static_cast<std::ptrdiff_t>(at));
    }
    bool reads_right() { return reads_right(0, model.size()); }
    Mapping::Kind kind(std::uint64_t c) {
        Mapping mapping;
        image->state().mapper.survey({c}, std::span(&mapping, 1));
        return mapping.kind;
    }
    void compact() {
        ZeroScan zeroes(*image, gauges);
        for (const auto &planned : zeroes.plan({0}, image->size(), all_of_it))
            if (planned.to_do)
                zeroes.run(planned.at, planned.length, go_on);
        zeroes.commit(go_on);
        CHECK(zeroes.plan({0}, image->size(), all_of_it).size() == 1);
        Compact compact(*image, ownership, gauges, 1);
        for (int pass = 0; pass < 4; ++pass) {
            run_plan(compact, image->size());
            compact.commit(go_on);
        }
        CHECK(gauges.pending == 0);
    }
    void reopen() {
        image->close();
        image.reset();
        CHECK(judge(disk->bytes()).clean());
        image = open_image(disk);
        CHECK(reads_right());
    }
    void finish() {
        CHECK(reads_right());
        reopen();
        image->close();
        const QemuVerdict qemu = ask_qemu(disk->bytes());
        INFO(qemu.output);
        CHECK((!qemu.available || qemu.status == 0));
    }

    Below below;
    std::shared_ptr<FaultyDisk> disk;
    std::unique_ptr<Image> image;
    Bytes model;
    MoveOwnership ownership;
    Gauges gauges;
};

using Kind = Mapping::Kind;

} // namespace

TEST_CASE("cloud-hypervisor#8621: several queues copy from a backing file") {
    constexpr std::uint64_t queues = 8, block = 4096;
    Backed b(2 * 1024 * 1024, 2 * 1024 * 1024 - 5000, 65536);
    std::atomic<unsigned> wrong{0};
    std::vector<Beside> threads(queues);
    for (std::uint64_t queue = 0; queue < queues; ++queue)
        threads[queue].start([&, queue] {
            std::mt19937_64 random(queue);
            for (int i = 0; i < 300; ++i) {
                // Of each 16 blocks that share a cluster every queue has two.
                const std::uint64_t at = (random() % (512 / queues) * queues + queue) * block + random() % 1000;
                b.write(at, 1 + random() % 3000, 1 + random() % 100);
                wrong += !b.reads_right(round_down(at, block), block);
                if (i % 100 == 99)
                    b.image->flush();
            }
        });
    for (auto &thread : threads)
        thread.join();
    CHECK(wrong == 0);
    b.finish();
}

TEST_CASE("cloud-hypervisor: a partial write after zeroes does not bring back what lies below") {
    const std::uint64_t cluster = GENERATE(std::uint64_t{512}, std::uint64_t{65536});
    const unsigned version = GENERATE(2u, 3u);
    Backed b(8 * cluster, 8 * cluster, cluster, version);
    b.zero(cluster, 3 * cluster);
    b.write(2 * cluster + 100, 7, 9);
    b.zero(5 * cluster + 13, cluster + 100);
    b.write(5 * cluster + 20, 3, 8);
    CHECK(b.kind(1) == (version == 2 ? Kind::data : Kind::zero));
    CHECK(b.reads_right());
    b.reopen();
    b.compact();
    b.finish();
}

TEST_CASE("QEMU msg63843: a discard over a backing file does not show it, in version 2 neither") {
    const unsigned version = GENERATE(2u, 3u);
    constexpr std::uint64_t cluster = 4096;
    Backed b(64 * cluster + 100, 64 * cluster + 100, cluster, version);
    b.write(2 * cluster, 20 * cluster, 5);
    b.trim(4 * cluster, 10 * cluster);
    b.trim(30 * cluster, 4 * cluster); // what lies below itself
    b.trim(15 * cluster + 1, 2 * cluster);
    b.trim(64 * cluster, 100); // sticks out of the disk
    CHECK(b.kind(4) == (version == 2 ? Kind::data : Kind::zero));
    CHECK(b.kind(30) == (version == 2 ? Kind::unallocated : Kind::zero));
    b.reopen();
    b.trim(0, b.model.size());
    b.compact();
    b.reopen();
    CHECK(b.kind(4) == (version == 2 ? Kind::data : Kind::zero));
    b.finish();
}

TEST_CASE("A table of zero clusters over a backing file is not empty, and moves with the others") {
    constexpr std::uint64_t cluster = 512, table = 64 * cluster;
    Backed b(8 * table, 8 * table, cluster);
    for (std::uint64_t i = 0; i < 8; ++i)
        b.write(i * table, table, 7);
    b.image->flush();
    b.trim(0, 7 * table);
    b.image->flush();
    b.compact();
    CHECK(b.image->state().l1.table(3).value != 0);
    const Survey now = survey_image(b.image->state(), go_on);
    CHECK(now.data == 64);
    CHECK(b.image->state().allocator.end() == now.data + now.metadata);
    b.finish();
}

TEST_CASE("All-zero clusters become zero clusters over a backing file, and go beyond its end") {
    const unsigned version = GENERATE(2u, 3u);
    constexpr std::uint64_t cluster = 4096;
    Backed b(32 * cluster, 16 * cluster, cluster, version);
    b.write(0, 32 * cluster, 0);
    b.write(3 * cluster, 5, 1);
    b.compact();
    CHECK(b.kind(0) == (version == 2 ? Kind::data : Kind::zero));
    CHECK(b.kind(3) == Kind::data);
    CHECK(b.kind(16) == Kind::unallocated);
    CHECK(b.kind(31) == Kind::unallocated);
    b.finish();
}

TEST_CASE("Zeroes and trims beyond the end of what lies below need no clusters and no table") {
    const unsigned version = GENERATE(2u, 3u);
    constexpr std::uint64_t cluster = 512, table = 64 * cluster;
    Backed b(40 * table, 2 * table, cluster, version);
    b.trim(4 * table, 30 * table);
    b.zero(4 * table, 30 * table);
    for (std::uint64_t i = 4; i < 34; ++i)
        CHECK(b.image->state().l1.table(i).value == 0);
    b.finish();
}

TEST_CASE("Trims and zeroes over a hole below need no table") {
    constexpr std::uint64_t cluster = 4096, table = 512 * cluster;
    Backed b(6 * table, table / 2, cluster, 3, 5 * table);
    b.trim(table, 3 * table);
    b.zero(table, 2 * table);
    for (std::uint64_t i = 1; i < 6; ++i)
        CHECK(b.image->state().l1.table(i).value == 0);
    b.trim(0, 6 * table);
    CHECK(b.image->state().l1.table(0).value != 0);
    CHECK(b.kind(0) == Kind::zero);
    b.finish();
}

TEST_CASE("A table of zero clusters beyond the end of what lies below is empty, and goes") {
    constexpr std::uint64_t cluster = 512, table = 64 * cluster;
    Backed b(4 * table, table, cluster);
    for (std::uint64_t i = 0; i < 4; ++i) {
        REQUIRE(b.image->state().mapper.ensure_table({i * 64}, Allocator::Growth::now));
        Mapper::Editor editor(b.image->state().mapper, {i * 64}, 64);
        for (std::uint64_t c = 0; c < 64; ++c)
            editor.set_zero({i * 64 + c}); // as QEMU trims
    }
    std::fill(b.model.begin(), b.model.end(), std::byte{0});
    b.compact();
    CHECK(b.image->state().l1.table(0).value != 0);
    for (std::uint64_t i = 1; i < 4; ++i)
        CHECK(b.image->state().l1.table(i).value == 0);
    b.finish();
}

TEST_CASE("Zeroes of version 2 that would have to be written are not fast") {
    Backed b(64 * 4096, 64 * 4096, 4096, 2);
    CHECK(!said([&] { b.image->zero({0}, 8 * 4096, Image::Zero::may_trim, true); }).empty());
    b.write(0, 8 * 4096, 5);
    b.image->zero({0}, 8 * 4096, Image::Zero::may_trim, true);
    std::fill_n(b.model.begin(), 8 * 4096, std::byte{0});
    b.finish();
}

TEST_CASE("What lies below and reaches beyond the end of the disk is not copied into its last cluster") {
    constexpr std::uint64_t cluster = 65536;
    Backed b(cluster + 1000, 4 * cluster, cluster);
    b.write(cluster + 10, 10, 3);
    b.image->flush();
    Mapping m;
    b.image->state().mapper.survey({1}, std::span(&m, 1));
    REQUIRE(m.kind == Kind::data);
    const Bytes now = b.disk->bytes();
    const auto begin = now.begin() + static_cast<std::ptrdiff_t>(m.host.value * cluster);
    CHECK(std::all_of(begin + 1000, begin + cluster, [](std::byte x) { return x == std::byte{0}; }));
    b.finish();
}

TEST_CASE("Whatever a crash leaves of trims and zeroes over a backing file, nothing older shows") {
    constexpr std::uint64_t cluster = 512;
    const std::uint64_t seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 random(seed);
    Backed b(192 * cluster, 192 * cluster, cluster);
    for (std::uint64_t c = 0; c < 192; ++c)
        if (c % 3 != 2)
            b.write(c * cluster, cluster, 1 + c % 7);
    b.image->flush();
    b.disk->record();
    for (int i = 0; i < 40; ++i) {
        const std::uint64_t at = random() % 190, n = 1 + random() % (192 - at);
        switch (random() % 4) {
        case 0:
            b.trim(at * cluster, n * cluster);
            break;
        case 1:
            b.zero(at * cluster, n * cluster);
            break;
        case 2:
            b.write(at * cluster + 5, 90, 40 + static_cast<unsigned>(i));
            break;
        default:
            b.image->flush();
        }
    }
    b.image->give_back();
    b.image.reset();
    PowerCuts cuts(*b.disk);
    REQUIRE(cuts.moments() > 20);
    unsigned wrong = 0;
    const auto look = [&](const Bytes &left) {
        const auto image = open_image(std::make_shared<FaultyDisk>(left), true);
        const Bytes now = read_all(*image);
        wrong += !judge(left).sound();
        // The guest wrote to two of three clusters before: nothing of the backing file may be there, ever.
        for (std::uint64_t i = 0; i < now.size(); ++i)
            wrong += i / cluster % 3 != 2 && now[i] >= std::byte{0x80};
    };
    for (std::size_t moment = 0; moment < cuts.moments(); ++moment) {
        cuts.move_to(moment);
        look(cuts.image_of_killed());
        for (int way = 0; way < 3; ++way)
            look(cuts.image(random_fates(cuts, random)));
    }
    CHECK(wrong == 0);
}

TEST_CASE("Whatever fails over a backing file, nothing older shows, and a trim does not fail for lack of space") {
    constexpr std::uint64_t cluster = 512;
    const int code = GENERATE(EIO, ENOSPC);
    unsigned struck = 0;
    for (std::uint64_t nth = 1; nth < 400; ++nth) {
        Backed b(192 * cluster, 192 * cluster, cluster);
        b.write(0, 64 * cluster, 1);
        b.write(70 * cluster, 3 * cluster, 2);
        b.image->flush();
        Fault fault;
        fault.nth = nth;
        fault.code = code;
        b.disk->fail(fault);
        unsigned trims_failed = 0;
        const auto attempt = [&](const std::function<void()> &request, bool is_trim = false) {
            try {
                request();
            } catch (const Error &error) {
                trims_failed += is_trim && error.kind() == Error::Kind::no_space;
            }
        };
        attempt([&] { b.image->trim({3 * cluster}, 20 * cluster); }, true);
        attempt([&] { b.image->zero({30 * cluster + 9}, 45 * cluster, Image::Zero::may_trim, false); });
        attempt([&] { b.image->trim({128 * cluster}, 64 * cluster); }, true);
        attempt([&] { b.image->write(bytes_of(100, 3), {100 * cluster + 9}); });
        attempt([&] { b.image->flush(); });
        attempt([&] { b.image->give_back(); });
        struck += b.disk->struck();
        if (!b.disk->struck())
            break;
        b.disk->heal();
        const auto look = [&](Image &image) {
            const Bytes now = read_all(image);
            unsigned wrong = 0;
            for (std::uint64_t i = 0; i < now.size(); ++i) {
                const bool hidden = i < 64 * cluster || (i >= 70 * cluster && i < 73 * cluster);
                wrong += hidden ? now[i] >= std::byte{0x80}
                                : now[i] != b.below.bytes[i] && now[i] != std::byte{0} && now[i] != std::byte{3};
            }
            return wrong;
        };
        CHECK(look(*b.image) == 0);
        attempt([&] { b.image->close(); });
        b.image.reset();
        CHECK(judge(b.disk->bytes()).sound());
        CHECK(look(*open_image(b.disk, true)) == 0);
        CHECK(trims_failed == 0);
    }
    CHECK(struck > 10);
    CHECK(struck < 399);
}
