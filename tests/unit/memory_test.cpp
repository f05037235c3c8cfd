// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Images that ask for memory or time that their content does not justify (lib/README.md, "Memory that an image can make
// us take").
#include "lib/bitmap_directory.h"
#include "lib/byte_order.h"
#include "lib/check/check.h"
#include "lib/check/source.h"
#include "lib/compact/zero_scan.h"
#include "lib/create.h"
#include "lib/header_home.h"
#include "lib/l2_entry.h"
#include "lib/snapshots.h"
#include "tests/catch.h"
#include "tests/fault/scene.h"
#include "tests/fuzz/memory_file.h"

#include <fstream>

using namespace qlean;
using namespace qlean::fault;
using fuzz::MemoryDisk;
using fuzz::MemoryFile;

namespace {

constexpr std::uint64_t cluster = 512;

void require_refused(const std::shared_ptr<MemoryDisk> &disk, bool read_only, const std::string &why) {
    Image::Options options;
    options.read_only = read_only;
    try {
        Image::open(std::make_unique<MemoryFile>(disk), options);
        FAIL("it was opened");
    } catch (const Error &error) {
        INFO(error.what());
        CHECK(std::string(error.what()).find(why) != std::string::npos);
    }
}

/// The most bytes of memory that were resident at a time since it was made, above what there was then.
class Growth {
  public:
    Growth() {
        std::ofstream clear("/proc/self/clear_refs");
        clear << 5; // the highest is the present one again
        REQUIRE(clear.flush());
        before_ = highest();
    }
    std::uint64_t bytes() const { return highest() - before_; }
    /// With a sanitizer nobody can tell: its own memory, a multiple of ours, is among it.
    bool within(std::uint64_t mebibytes) const {
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
        WARN("not compared with " << mebibytes << " MiB: " << bytes());
        return true;
#else
        UNSCOPED_INFO(bytes() << " bytes");
        return bytes() < mebibytes << 20;
#endif
    }

  private:
    static std::uint64_t highest() {
        std::ifstream status("/proc/self/status");
        std::string word;
        std::uint64_t kib = 0;
        while (status >> word)
            if (word == "VmHWM:" && status >> kib)
                return kib * 1024;
        FAIL("no VmHWM in /proc/self/status");
        return 0;
    }

    std::uint64_t before_ = 0;
};

struct Reads {
    std::uint64_t longest = 0, bytes = 0;
};

class Watched final : public MemoryFile {
  public:
    Watched(std::shared_ptr<MemoryDisk> disk, Reads &reads) : MemoryFile(std::move(disk)), reads_(reads) {}
    void read(std::span<std::byte> into, HostOffset at) override {
        reads_.longest = std::max<std::uint64_t>(reads_.longest, into.size());
        reads_.bytes += into.size();
        MemoryFile::read(into, at);
    }

  private:
    Reads &reads_;
};

/// Writes the header extension that says where the bitmaps are; the image has one.
void claim_bitmaps(Bytes &image, std::uint32_t count, std::uint64_t directory_bytes, std::uint64_t directory) {
    std::uint64_t at = 104;
    while (load_be<std::uint32_t>(image, at) != Header::extension_bitmaps)
        at += 8 + round_up(load_be<std::uint32_t>(image, at + 4), 8);
    store_be<std::uint32_t>(image, at + 8, count);
    store_be<std::uint64_t>(image, at + 16, directory_bytes);
    store_be<std::uint64_t>(image, at + 24, directory);
}

/// A directory, at a place that the image has, of `count` bitmaps with one table of so many words.
void name_table(Bytes &image, std::uint64_t directory, std::uint32_t count, std::uint64_t table, std::uint32_t words,
                std::uint32_t flags) {
    for (std::uint32_t i = 0; i < count; ++i)
        store_bitmap_entry(image, directory + i * bitmap_entry_bytes, table, words, flags, std::to_string(i));
    claim_bitmaps(image, count, count * bitmap_entry_bytes, directory);
}

constexpr std::uint64_t largest_cluster = 2 * 1024 * 1024, one_bit_disk = 64 * 1024 * 1024;

std::shared_ptr<FaultyDisk> created(const CreateOptions &options) {
    const auto disk = std::make_shared<FaultyDisk>(Bytes{});
    FaultyFile file(disk);
    create_image(file, options);
    return disk;
}

/// An empty image whose one refcount block has a bit for each of 2^24 clusters.
std::shared_ptr<FaultyDisk> one_bit_counts() {
    CreateOptions options;
    options.cluster_size = largest_cluster;
    options.refcount_order = 0;
    options.virtual_size = one_bit_disk;
    return created(options);
}

/// Makes this the image's snapshot table, at a place that the image has.
void store_snapshots(Bytes &image, const SnapshotTable &table, std::uint64_t at) {
    const auto encoded = table.encode();
    std::copy(encoded.begin(), encoded.end(), image.begin() + static_cast<std::ptrdiff_t>(at));
    store_be<std::uint32_t>(image, 60, static_cast<std::uint32_t>(table.entries.size()));
    store_be<std::uint64_t>(image, 64, at);
}

} // namespace

TEST_CASE(
    "A file with holes that claims more clusters than can be counted is refused before memory is taken for them") {
    for (const unsigned bits : {41u, 50u, 62u}) {
        const auto disk = std::make_shared<MemoryDisk>(empty_image(65536, cluster));
        disk->length = std::uint64_t{1} << bits;
        require_refused(disk, true, "too many for clusters of 512 bytes");
        require_refused(disk, false, "too many for clusters of 512 bytes");
    }
}

TEST_CASE("L1 tables of snapshots that lie on top of each other are not all read") {
    // 200 snapshots, each with a table of 16 KiB that begins a cluster behind the one before.
    ImagePlan plan;
    plan.virtual_size = 64 * 1024;
    Bytes bytes = build_image(plan).bytes;
    SnapshotTable table;
    const std::uint64_t first = 64 * 1024, entries = 2048, count = 200;
    for (std::uint64_t i = 0; i < count; ++i) {
        SnapshotEntry e;
        e.l1_offset = {first + i * cluster};
        e.l1_size = entries;
        e.id = e.name = std::to_string(i);
        table.entries.push_back(e);
    }
    const std::uint64_t at = round_up(bytes.size(), cluster);
    bytes.resize(first + count * cluster + entries * 8);
    REQUIRE(at + table.encode().size() <= first);
    store_snapshots(bytes, table, at);
    require_refused(std::make_shared<MemoryDisk>(bytes), true, "larger than the file");
}

TEST_CASE("The tables that a snapshot's L1 table names are not listed when the image is opened") {
    constexpr std::uint64_t size = 64 * 1024, l1_bytes = 32 * 1024 * 1024, first = 16 * size;
    CreateOptions options;
    options.virtual_size = size;
    Bytes bytes = created(options)->bytes();
    SnapshotTable table;
    table.entries.resize(1);
    table.entries[0].l1_offset = {first};
    table.entries[0].l1_size = l1_bytes / 8;
    table.entries[0].id = table.entries[0].name = "1";
    const std::uint64_t at = round_up(bytes.size(), size), other = at + size;
    REQUIRE(other + 2 * size <= first);
    bytes.resize(first + l1_bytes);
    store_snapshots(bytes, table, at);
    for (std::uint64_t i = 0; i < l1_bytes; i += 8) // no two neighbours are a run
        store_be<std::uint64_t>(bytes, first + i, other + i / 8 % 2 * size);
    const auto memory = std::make_shared<FaultyDisk>(std::move(bytes));
    const Growth growth;
    const auto image = open_image(memory);
    image->state().allocator.load_all();
    CHECK(growth.within(80));
}

TEST_CASE("What bitmaps have is not listed when space is looked for") {
    ImagePlan plan;
    plan.virtual_size = 256 * 1024;
    plan.bitmaps = true;
    Bytes bytes = build_image(plan).bytes;
    // 200 bitmaps have one table, whose entries alternate between two clusters: no two neighbours are a run.
    constexpr std::uint64_t count = 200, words = 64 * 1024;
    const std::uint64_t directory = round_up(bytes.size(), cluster);
    const std::uint64_t table = round_up(directory + count * bitmap_entry_bytes, cluster), stored = table + words * 8;
    bytes.resize(count * words * 8 + stored); // tables together no longer than the file
    name_table(bytes, directory, count, table, words, BitmapEntry::flag_in_use);
    for (std::uint64_t i = 0; i < words; ++i)
        store_be<std::uint64_t>(bytes, table + i * 8, stored + i % 2 * 2 * cluster);
    const auto image = open_image(std::make_shared<FaultyDisk>(std::move(bytes)));
    REQUIRE(image->state().bitmaps);
    const Growth growth;
    image->state().allocator.load_all();
    CHECK(growth.within(32));
}

TEST_CASE("L2 tables that a commit wrote leave the cache again") {
    constexpr std::uint64_t cache = 64 * 1024, tables = 2000, per_table = cluster / 8 * cluster;
    const auto image = open_image(std::make_shared<FaultyDisk>(empty_image(tables * per_table, cluster)), false, cache);
    for (const std::uint64_t within : {std::uint64_t{0}, cluster}) { // a new table, and one that is there
        for (std::uint64_t i = 0; i < tables; ++i) {
            image->write(bytes_of(cluster, 7), {i * per_table + within});
            if (i % 50 == 49)
                image->flush();
        }
        CHECK(image->state().l2.memory_bytes() <= 2 * cache);
    }
}

TEST_CASE("Of a snapshot table with a damaged entry no more is read than up to that entry") {
    ImagePlan plan;
    plan.virtual_size = 64 * 1024;
    Bytes bytes = build_image(plan).bytes;
    SnapshotTable table;
    SnapshotEntry e;
    e.l1_offset = {1}; // no cluster begins there
    e.l1_size = 1;
    e.name = std::string(60000, 'x');
    table.entries.push_back(e);
    const std::uint64_t at = round_up(bytes.size(), cluster);
    const auto encoded = table.encode();
    bytes.resize(at);
    bytes.insert(bytes.end(), encoded.begin(), encoded.end());
    const auto disk = std::make_shared<MemoryDisk>(bytes);
    disk->length = std::uint64_t{128} << 20; // what follows is a hole
    for (const std::uint32_t count : {1u, 1000u, 60000u, 0xffffffffu}) {
        store_be<std::uint32_t>(disk->bytes, 60, count);
        store_be<std::uint64_t>(disk->bytes, 64, at);
        Reads reads;
        try {
            Image::open(std::make_unique<Watched>(disk, reads), {});
            FAIL("it was opened");
        } catch (const Error &error) {
            const std::string text = error.what();
            INFO(text);
            const auto what = count > SnapshotTable::max_snapshots
                                  ? "it claims 4294967295 snapshots"
                                  : "entry 0 of its snapshot table has its L1 table at the impossible offset";
            CHECK(text.find(what) != text.npos);
        }
        CHECK(reads.longest >= encoded.size());
        CHECK(reads.longest <= 1 << 20);
    }
}

TEST_CASE("A snapshot table that is long and right is read to its end") {
    // Entries are longer than what is read at first for each of them, and the last one ends with the file.
    ImagePlan plan;
    plan.virtual_size = 64 * 1024;
    Bytes bytes = build_image(plan).bytes;
    SnapshotTable table;
    for (std::uint32_t i = 0; i < 3000; ++i) {
        SnapshotEntry e;
        e.id = std::to_string(i);
        e.name = std::string(900 + i % 200, static_cast<char>('a' + i % 26));
        e.extra.resize(16);
        table.entries.push_back(e);
    }
    const auto encoded = table.encode();
    const std::uint64_t at = round_up(bytes.size(), cluster);
    bytes.resize(at + encoded.size());
    store_snapshots(bytes, table, at);
    MemoryFile file(std::make_shared<MemoryDisk>(bytes));
    const auto loaded = Snapshots::load(file, read_header(file).first, bytes.size());
    CHECK(loaded.bytes == encoded.size());
    std::vector<SnapshotEntry> found;
    for (const auto &snapshot : loaded.list)
        found.push_back(snapshot->entry());
    CHECK((found == table.entries));
}

TEST_CASE("A check reads no more of a bitmap directory than its entries, however long it claims to be") {
    ImagePlan plan;
    plan.virtual_size = 256 * 1024;
    plan.bitmaps = true;
    Bytes bytes = build_image(plan).bytes;
    const std::uint64_t directory = round_up(bytes.size(), cluster);
    claim_bitmaps(bytes, 1, BitmapsExtension::max_directory_bytes, directory);
    const auto disk = std::make_shared<MemoryDisk>(bytes);
    disk->length = directory + BitmapsExtension::max_directory_bytes; // a hole: entries without names
    Reads reads;
    Watched file(disk, reads);
    CHECK(check_file(file).check_errors == 1);
    CHECK(reads.longest <= 1 << 20);
    CHECK(reads.bytes <= 4 << 20);
}

TEST_CASE("A check reads no bitmap table again and again for a directory that names it often") {
    ImagePlan plan;
    plan.virtual_size = 256 * 1024;
    plan.bitmaps = true;
    Bytes bytes = build_image(plan).bytes;
    // The directory names one table, which is as long as the file, 5000 times.
    const std::uint64_t directory = round_up(bytes.size(), cluster), count = 5000;
    const std::uint64_t table = directory + count * bitmap_entry_bytes, words = 64 * 1024;
    bytes.resize(table + words * 8);
    name_table(bytes, directory, count, table, words, 0);
    Reads reads;
    Watched file(std::make_shared<MemoryDisk>(bytes), reads);
    CHECK(check_file(file).check_errors == 1);
    CHECK(reads.bytes < 8 * bytes.size());
}

TEST_CASE("An image with more enabled bitmaps than fit into memory is not opened for writing, and can be read") {
    // Bitmaps of 512 bytes a bit for a disk of 64 TiB: 16 GiB each. The disk itself needs an L1 table of 32 MiB.
    const Geometry geometry(21, 4, std::uint64_t{64} << 40);
    BitmapDirectory directory;
    BitmapEntry e;
    e.flags = BitmapEntry::flag_auto;
    e.granularity_bits = 16; // 128 MiB each
    for (int i = 0; i < 16; ++i)
        directory.entries.push_back(e);
    CHECK_NOTHROW(require_trackable(directory, geometry, ""));
    directory.entries.push_back(e);
    CHECK_THROWS_AS(require_trackable(directory, geometry, ""), Error);
    directory.entries.back().flags = 0; // disabled: nothing of it is kept in memory
    CHECK_NOTHROW(require_trackable(directory, geometry, ""));
}

TEST_CASE("A check takes no memory for the tables that a header claims, and the file has not") {
    Bytes bytes = empty_image(65536, cluster);
    store_be<std::uint32_t>(bytes, 36, 4 * 1024 * 1024); // entries of the L1 table: 32 MiB
    store_be<std::uint32_t>(bytes, 56, 16 * 1024);       // clusters of the refcount table: 8 MiB
    MemoryFile file(std::make_shared<MemoryDisk>(bytes));
    FileSource source(file, read_header(file).first);
    CHECK(source.l1().size() * 8 <= bytes.size());
    CHECK(source.refcount_table().size() * 8 <= bytes.size());
    CHECK(check_file(file).corruptions > 0);
}

TEST_CASE("Looking for zeroes at the end of a huge disk takes no memory for all that is before it") {
    constexpr std::uint64_t size = 65536, disk = std::uint64_t{512} << 40;
    const auto image = open_image(std::make_shared<FaultyDisk>(empty_image(disk, size)));
    image->write(bytes_of(size, 7), {disk - size});
    Gauges gauges;
    ZeroScan zeroes(*image, gauges);
    const Growth growth;
    zeroes.run({disk - size}, size, never);
    for (const auto &planned : zeroes.plan({disk - size}, size, 10))
        CHECK_FALSE(planned.to_do); // it is known now
    CHECK(growth.within(32));       // was 1 GiB
}

TEST_CASE("Entries that point anywhere beyond the end of the file take no memory") {
    constexpr std::uint64_t size = 65536, tables = 8, entries = 8192;
    Bytes bytes = empty_image(tables * entries * size, size);
    const std::uint64_t l1 = load_be<std::uint64_t>(bytes, 40), at = round_up(bytes.size(), size);
    bytes.resize(at + tables * size);
    for (std::uint64_t t = 0; t < tables; ++t) {
        store_be<std::uint64_t>(bytes, l1 + t * 8, (at + t * size) | entry::copied);
        for (std::uint64_t e = 0; e < entries; ++e)
            store_be<std::uint64_t>(bytes, at + t * size + e * 8, ((t * entries + e + 1) << 38) | entry::copied);
    }
    const auto image = Image::open(std::make_unique<MemoryFile>(std::make_shared<MemoryDisk>(bytes)), {});
    const Growth growth;
    Bytes sector(512);
    for (std::uint64_t c = 0; c < tables * entries; c += 512)
        CHECK_THROWS_AS(image->read(sector, {c * size}), Error);
    CHECK(growth.within(64)); // was 259 MiB
}

TEST_CASE("A refcount block for 2^24 clusters takes no memory for those that the file does not have") {
    const auto image = open_image(one_bit_counts());
    const Growth growth;
    image->trim({0}, one_bit_disk);
    image->state().allocator.load_all();
    CHECK(growth.within(32)); // was 128 MiB
}

TEST_CASE("Counts of 2^24 clusters beyond the end of the file: a walk gives up, a check takes no memory") {
    Bytes bytes = one_bit_counts()->bytes();
    const auto block = load_be<std::uint64_t>(bytes, load_be<std::uint64_t>(bytes, 48));
    const std::uint64_t clusters = divide_up(bytes.size(), largest_cluster);
    REQUIRE(clusters <= 8);
    const auto every_other = [&](std::uint64_t stretches) {
        for (std::uint64_t i = 0; i < stretches; ++i)
            bytes[block + 1 + i / 4] |= std::byte(1 << i % 4 * 2);
    };
    constexpr std::uint64_t limit = std::uint64_t{1} << 22;
    bool gives_up = true;
    SECTION("when compaction walks the image") {
        SECTION("of clusters that are not used") { every_other(4 * (largest_cluster - 1)); }
        SECTION("and of some that are: there is one limit for both") {
            bytes[block] &= ~std::byte{0b1010};
            every_other(limit - 1);
        }
        SECTION("and no more than the limit") {
            bytes[block] &= ~std::byte{0b1010};
            every_other(limit - 2);
            gives_up = false;
        }
        const auto image = open_image(std::make_shared<FaultyDisk>(bytes));
        const Allocator::Watch watch(image->state().allocator);
        const Growth growth;
        std::string said;
        try {
            verify_image(image->state(), watch, never);
        } catch (const Error &error) {
            said = error.what();
        }
        CHECK(said.find(gives_up ? "more than 4194304 stretches of it have wrong refcounts"
                                 : "host cluster 1 is in use, but has no refcount") != std::string::npos);
        CHECK(growth.within(170)); // each stretch noted, without a limit: 1.6 GiB
    }
    SECTION("when it is checked") {
        every_other(4 * (largest_cluster - 1));
        MemoryFile file(std::make_shared<MemoryDisk>(bytes));
        const Growth growth;
        CHECK(check_file(file).corruptions == 0);
        CHECK(growth.within(32));
    }
}
