// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Parts of the engine by themselves: the allocator's life cycle, new images, opening of hostile ones, and the disk
// against a byte array.
#include "lib/byte_order.h"
#include "lib/create.h"
#include "lib/error.h"
#include "lib/refcounts.h"
#include "tests/fault/scene.h"

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <unistd.h>

using namespace qlean;
using namespace qlean::fault;

namespace {

constexpr std::uint64_t cluster = 512;

Scene allocator_scene() {
    ImagePlan plan;
    plan.virtual_size = 64 * cluster;
    plan.map(20, 10, 2);
    plan.metadata_at = 60;
    return Scene(build_image(plan).bytes);
}

} // namespace

TEST_CASE("A cluster is in use, retired, free, and only then punched and handed out again") {
    Scene s = allocator_scene();
    Allocator &a = s.image->state().allocator;
    a.load_all();
    const auto before = a.counts();
    s.image->trim({0}, cluster); // host cluster 10
    CHECK(a.counts().retired == 1);
    CHECK(a.counts().free == before.free);
    CHECK_FALSE(a.is_free({10}));
    {
        const auto taken = a.reserve_below(1000, {60});
        for (const auto &extent : taken.extents())
            CHECK_FALSE((extent.run.first.value <= 10 && 10 < extent.run.end().value));
    }                 // not published: retired
    s.image->flush(); // unlinked durably; the refcount is lowered by the next commit, or one that gives back
    CHECK_FALSE(a.is_free({10}));
    s.image->state().write_back.commit(WriteBack::Give::back);
    CHECK(a.counts().retired == 0);
    CHECK(a.is_free({10}));
    CHECK(a.waiting_to_punch_bytes() > 0);
    CHECK(s.disk->count(mask(Op::punch)) == 0);
    while (a.punch_step(1 << 20)) {
    }
    CHECK(s.disk->count(mask(Op::punch)) > 0);
    CHECK(a.is_free({10}));
    auto again = a.reserve_contiguous_below(1, {11});
    REQUIRE(again.count() == 1);
    CHECK_FALSE(a.is_free(again.extents().front().run.first));
}

TEST_CASE("A refcount as high as its width allows is not incremented, and nothing beside it") {
    for (unsigned order = 0; order <= 6; ++order) {
        INFO("refcounts of 2^" << order << " bits");
        auto disk = std::make_shared<FaultyDisk>();
        FaultyFile file(disk);
        CreateOptions options;
        options.virtual_size = 1 << 20;
        options.cluster_size = cluster;
        options.refcount_order = order;
        create_image(file, options);
        const Geometry geometry(9, order, options.virtual_size);
        const std::uint64_t max = RefcountView::max(order), block = 2 * cluster;
        Bytes bytes(cluster);
        file.read(bytes, {block});
        RefcountView(bytes, order).set(21, max);
        RefcountView(bytes, order).set(20, max - 1);
        file.write(bytes, {block});
        Refcounts refcounts(geometry, file, {big_endian(block)}, {cluster});
        CHECK_THROWS_AS(refcounts.increment({{20}, 3}), Error);
        CHECK_FALSE(refcounts.dirty());
        CHECK(refcounts.get({20}) == max - 1);
        CHECK(refcounts.get({21}) == max);
        CHECK(refcounts.get({22}) == 0);
        refcounts.increment({{20}, 1});
        CHECK(refcounts.get({20}) == max);
        CHECK(refcounts.get({19}) == 0);
        CHECK(cluster_count(refcounts.decrement({{20}, 2})) == (max == 1 ? 2 : 0));
        CHECK(refcounts.get({20}) == max - 1);
        CHECK(refcounts.get({21}) == max - 1);
        refcounts.increment({{30}, 2});
        CHECK(refcounts.decrement({{30}, 2}, max) == std::vector<HostRun>{{{30}, 2}});
        CHECK(refcounts.get({31}) == 0);
        if (max > 1) {
            CHECK(refcounts.decrement({{20}, 1}, max - 2).empty());
            CHECK(refcounts.get({20}) == 1);
            CHECK(refcounts.decrement({{20}, 1}, max) == std::vector<HostRun>{{{20}, 1}});
        }
    }
}

TEST_CASE("Clusters are handed out lowest first, below a limit, adjacent, and not under an embargo") {
    Scene s = allocator_scene();
    Allocator &a = s.image->state().allocator;
    a.load_all();
    const std::uint64_t free = a.free_below({60});
    REQUIRE(free > 6);
    auto one = a.reserve_below(1, {60});
    REQUIRE(one.count() == 1);
    const HostCluster lowest = one.extents().front().run.first;
    CHECK(a.free_below({60}) == free - 1);
    for (std::uint64_t c = 0; c < lowest.value; ++c)
        CHECK_FALSE(a.is_free({c}));
    auto all = a.reserve_below(1000, {60});
    CHECK(all.count() == free - 1);
    CHECK(a.reserve_below(1, {60}).empty());
    CHECK(a.reserve_contiguous_below(2, {60}).empty());
    all = {};
    one = {};
    s.image->state().write_back.commit(WriteBack::Give::back); // they come back through the commit
    CHECK(a.free_below({60}) == free);
    const HostRun kept{lowest, 1};
    a.embargo(kept);
    const auto around = a.reserve_below(1000, {60});
    for (const auto &extent : around.extents())
        CHECK((extent.run.end() <= lowest || extent.run.first > lowest));
    const auto held = a.reserve_contiguous_below(1, {60});
    REQUIRE(held.count() == 1);
    CHECK(held.extents().front().run == kept);
    a.embargo({});
}

TEST_CASE("The end of the file is the allocator's: growth, cutting, and what is counted") {
    Scene s = allocator_scene();
    Allocator &a = s.image->state().allocator;
    a.load_all();
    const std::uint64_t end = a.end();
    auto grown = a.reserve(3000, Allocator::Growth::now);
    REQUIRE(grown.count() == 3000);
    CHECK(a.end() > end);
    CHECK(s.disk->length() == a.end() * cluster);
    grown = {};
    s.image->state().write_back.commit(WriteBack::Give::back);
    const HostCluster top = a.highest_in_use({0});
    while (a.truncate_step(64 * cluster, HostCluster{0})) {
    }
    CHECK(a.end() == top.value);
    CHECK(s.disk->length() == top.value * cluster);
    const auto counts = a.counts();
    CHECK(counts.complete);
    CHECK(counts.live() + counts.free + counts.retired + counts.punching == counts.end);
}

TEST_CASE("A new image is what QEMU takes it for") {
    for (const unsigned version : {2u, 3u})
        for (const std::uint64_t size : {512, 4096, 65536, 2097152})
            for (const std::uint64_t disk :
                 {std::uint64_t{0}, std::uint64_t{1}, std::uint64_t{1} << 20, (std::uint64_t{1} << 30) + 512}) {
                INFO("version " << version << ", clusters of " << size << ", disk of " << disk);
                const Bytes image = empty_image(disk, size, version);
                CHECK(judge(image).text() == "0 leaked clusters");
                auto opened = open_image(std::make_shared<FaultyDisk>(image));
                CHECK(opened->size() == disk);
                const auto qemu = ask_qemu(image);
                if (qemu.available) {
                    INFO(qemu.output);
                    CHECK(qemu.status == 0);
                }
            }
}

TEST_CASE("qemu-img info reads from a new image what was asked for") {
    const char *directory = std::getenv("TMPDIR");
    std::string path = std::string(directory ? directory : "/tmp") + "/qlean-new-XXXXXX";
    ::close(::mkstemp(path.data()));
    const Bytes image = empty_image(123456789 * 512ull, 131072, 2);
    std::ofstream(path, std::ios::binary)
        .write(reinterpret_cast<const char *>(image.data()), static_cast<std::streamsize>(image.size()));
    std::string text;
    if (FILE *pipe = ::popen(("qemu-img info -f qcow2 '" + path + "' 2>/dev/null").c_str(), "r")) {
        char line[256];
        while (std::fgets(line, sizeof line, pipe))
            text += line;
        ::pclose(pipe);
    }
    ::unlink(path.c_str());
    if (text.empty()) {
        WARN("no qemu-img here: not tested");
        return;
    }
    INFO(text);
    CHECK(text.find("(63209875968 bytes)") != std::string::npos);
    CHECK(text.find("cluster_size: 131072") != std::string::npos);
    CHECK(text.find("compat: 0.10") != std::string::npos);
}

TEST_CASE("Impossible images are not created") {
    const auto refused = [](CreateOptions options) {
        const auto disk = std::make_shared<FaultyDisk>();
        FaultyFile file(disk);
        try {
            create_image(file, options);
        } catch (const Error &error) {
            return disk->length() == 0 && std::strlen(error.what()) > 10;
        }
        return false;
    };
    CHECK(refused({1 << 20, 256, 3}));
    CHECK(refused({1 << 20, 4194304, 3}));
    CHECK(refused({1 << 20, 5000, 3}));
    CHECK(refused({1 << 20, 65536, 4}));
    CHECK(refused({std::uint64_t{1} << 50, 512, 3}));
}

TEST_CASE("A truncated image is refused or reads as before, at whatever length it ends") {
    ImagePlan plan;
    plan.virtual_size = 40 * cluster;
    plan.map_all(8);
    const Bytes whole = build_image(plan).bytes;
    const Bytes disk = guest_bytes(whole);
    for (std::size_t length = 0; length < whole.size(); length += 100) {
        INFO(length << " of " << whole.size() << " bytes");
        try {
            auto image = open_image(
                std::make_shared<FaultyDisk>(Bytes(whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(length))),
                true);
            const Bytes got = read_all(*image);
            // Accepted: then at most the part of the last cluster that the file lacks may differ.
            REQUIRE(got.size() == disk.size());
            REQUIRE((got == disk));
        } catch (const Error &error) {
            REQUIRE(std::string(error.what()).find("faulty.qcow2") != std::string::npos);
        }
    }
}

TEST_CASE("No damage to an image does worse than an error: opening, reading, writing, compacting") {
    const std::uint64_t seed = fresh_seed();
    INFO("QLEAN_SEED=" << seed);
    std::mt19937_64 random(seed);
    ImagePlan plan;
    plan.virtual_size = 128 * cluster;
    for (std::uint64_t c = 0; c < 128; c += 2)
        plan.data[c] = 8 + c * 2;
    const BuiltImage built = build_image(plan);
    for (int i = 0; i < 400; ++i) {
        INFO("round " << i);
        BuiltImage damaged = built;
        for (auto n = 1 + random() % 3; n > 0; --n) {
            const std::uint64_t places[] = {
                random() % 104 / 8 * 8, damaged.l1 + random() % 2 * 8, damaged.refcount_table + random() % 4 * 8,
                damaged.l2_entry_at(random() % 128), damaged.refcount_blocks[0] + random() % 64 * 8};
            const std::uint64_t at = places[random() % 5];
            const std::uint64_t values[] = {random(), random() % 400 * 512, random() % 400 * 512 | entry::copied,
                                            damaged.word(at) ^ std::uint64_t{1} << random() % 64, 0};
            damaged.set_word(at, values[random() % 5]);
        }
        const auto disk = std::make_shared<FaultyDisk>(damaged.bytes);
        Fault bound; // an image that says it is huge must not make the file so
        bound.ops = mask(Op::truncate);
        bound.code = ENOSPC;
        bound.lasting = true;
        bound.only = [](const Request &r) { return r.at > 64 << 20; };
        disk->fail(bound);
        std::unique_ptr<Image> image;
        try {
            image = open_image(disk);
        } catch (const Error &) {
            continue;
        }
        const std::uint64_t size = std::min<std::uint64_t>(image->size(), 1 << 20);
        for (const auto &request : std::vector<std::function<void()>>{
                 [&] { (void)read_some(*image, 0, size); },
                 [&] { image->write(bytes_of(std::min<std::uint64_t>(size, 3000), 1), {0}); },
                 [&] { image->trim({0}, size); }, [&] { image->flush(); },
                 [&] {
                     if (image->size() <= 1 << 20)
                         compact_all(*image);
                 },
                 [&] { image->close(); }}) {
            try {
                if (size > 0)
                    request();
            } catch (const Error &) {
            }
        }
    }
}

TEST_CASE("The disk is a byte array: every cluster size and version, any alignment") {
    const std::uint64_t seed = fresh_seed();
    INFO("QLEAN_SEED=" << seed);
    for (const unsigned version : {2u, 3u})
        for (const std::uint64_t size : {512, 4096, 65536, 2097152}) {
            INFO("version " << version << ", clusters of " << size);
            Scene s(empty_image(size * 5 + 777, size, version));
            RecordedGuest guest(*s.image, *s.disk, seed);
            RecordedGuest::Mix mix{40, 15, 15, 5, 25};
            mix.most = std::min<std::uint64_t>(size * 3, 300000);
            for (int i = 0; i < 80; ++i)
                guest.step(mix);
            guest.check(0, s.image->size());
            s.image->close();
            CHECK(judge(s.disk->bytes()).text() == "0 leaked clusters");
            CHECK((guest_bytes(s.disk->bytes()) == guest.now()));
        }
}
