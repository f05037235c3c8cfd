// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// An external data file: the disk against a byte array, the order of writes over two files, and headers and entries
// that lie about it.
#include "lib/byte_order.h"
#include "lib/data_file.h"
#include "tests/fault/scene.h"

#include <filesystem>
#include <fstream>
#include <random>

using namespace qlean;
using namespace qlean::fault;

namespace {

namespace fs = std::filesystem;

/// An empty image with a data file, both on disks that remember.
struct Pair {
    Pair(std::uint64_t size, std::uint64_t cluster, bool raw) {
        Bytes bytes = empty_image(size, cluster);
        store_be<std::uint64_t>(bytes, 72, Header::incompatible_data_file);
        store_be<std::uint64_t>(bytes, 88, (raw ? Header::autoclear_data_file_raw : 0) | 4);
        image_disk = std::make_shared<FaultyDisk>(std::move(bytes));
        data_disk = std::make_shared<FaultyDisk>(Bytes(raw ? size : 0));
        open();
    }

    void open(bool read_only = false) {
        image.reset();
        Image::Options options;
        options.read_only = read_only;
        options.cache_bytes = 64 * 1024;
        options.open_data = [&](const Header &) { return std::make_unique<FaultyFile>(data_disk); };
        image = Image::open(std::make_unique<FaultyFile>(image_disk), options);
    }

    Header header() const { return Header::parse(image_disk->bytes(), "test"); }

    std::shared_ptr<FaultyDisk> image_disk, data_disk;
    std::unique_ptr<Image> image;
};

Header with_name(const std::string &name) {
    Header header;
    header.incompatible = Header::incompatible_data_file;
    const auto *bytes = reinterpret_cast<const std::byte *>(name.data());
    header.extensions.push_back({Header::extension_data_file, {bytes, bytes + name.size()}});
    return header;
}

std::string refusal(const std::function<void()> &what) {
    try {
        what();
    } catch (const Error &error) {
        return error.what();
    }
    return "";
}

bool says(const std::string &text, const char *part) { return text.find(part) != std::string::npos; }

} // namespace

TEST_CASE("A disk with a data file is a byte array; raw, the file is the same array") {
    const std::uint64_t seed = fresh_seed();
    INFO("QLEAN_SEED=" << seed);
    const bool raw = GENERATE(false, true);
    const std::uint64_t cluster = GENERATE(512, 4096, 65536);
    const std::uint64_t size = 700 * 1024 + 512;
    INFO("raw " << raw << ", clusters of " << cluster);
    std::mt19937_64 random(seed);
    Pair pair(size, cluster, raw);
    Bytes model(size);
    for (int i = 0; i < 400; ++i) {
        const std::uint64_t at = random() % size;
        const std::uint64_t n = std::min<std::uint64_t>(1 + random() % (random() % 4 ? 6000 : 200000), size - at);
        const auto from = model.begin() + static_cast<std::ptrdiff_t>(at), to = from + static_cast<std::ptrdiff_t>(n);
        switch (random() % 8) {
        case 0:
            pair.image->trim({at}, n);
            for (auto b = from; b != to; ++b) // as it was, or zeroes
                if (const Bytes now = read_some(*pair.image, static_cast<std::uint64_t>(b - model.begin()), 1);
                    now[0] != *b) {
                    REQUIRE(now[0] == std::byte{0});
                    *b = std::byte{0};
                }
            break;
        case 1:
        case 2:
            pair.image->zero({at}, n, random() % 2 ? Image::Zero::may_trim : Image::Zero::keep_space, false);
            std::fill(from, to, std::byte{0});
            break;
        case 3:
            pair.image->flush();
            break;
        case 4: {
            MoveOwnership ownership;
            Gauges gauges;
            ZeroScan zeroes(*pair.image, gauges);
            zeroes.run({0}, size, never);
            zeroes.commit(never);
            Compact compact(*pair.image, ownership, gauges, 1);
            for (const auto &planned : compact.plan({0}, size, 1000))
                if (planned.to_do)
                    compact.run(planned.at, planned.length, never);
            compact.commit(never);
            break;
        }
        default: {
            const Bytes bytes = bytes_of(n, static_cast<unsigned>(1 + random() % 255));
            pair.image->write(bytes, {at});
            std::copy(bytes.begin(), bytes.end(), from);
        }
        }
        if (i % 50 == 49) {
            REQUIRE(read_all(*pair.image) == model);
            REQUIRE(pair.data_disk->length() <= size);
            if (raw)
                REQUIRE(pair.data_disk->bytes() == model);
            pair.image->close();
            pair.open();
        }
    }
    CHECK(read_all(*pair.image) == model);
    // The bit that we keep up is set for ever, the one that nobody knows went before the first write.
    CHECK(pair.header().autoclear == (raw ? Header::autoclear_data_file_raw : 0));
}

TEST_CASE("The guest's data is durable before an entry points at it, and a sync that fails poisons both files") {
    Pair pair(64 * 4096, 4096, false);
    pair.image->write(bytes_of(4096, 1), {0}); // the table
    pair.image->flush();
    pair.data_disk->record();
    std::size_t synced_at_publication = 0;
    const HostOffset table = pair.image->state().l1.table(0);
    pair.image_disk->add_hook(true, [&](const Request &r) {
        if (r.op == Op::write && r.at >= table.value && r.at < table.value + 4096)
            for (const Event &event : pair.data_disk->events())
                synced_at_publication += event.kind == Event::Kind::sync_ended;
    });
    pair.image->write(bytes_of(4096, 2), {4096});
    pair.image->flush();
    CHECK(synced_at_publication > 0);

    Fault no_sync;
    no_sync.ops = mask(Op::sync);
    pair.data_disk->fail(no_sync);
    pair.image->write(bytes_of(4096, 3), {8192});
    CHECK_THROWS_AS(pair.image->flush(), Error);
    pair.data_disk->heal();
    CHECK_THROWS_AS(pair.image->write(bytes_of(512, 4), {0}), Error);
    CHECK_THROWS_AS(pair.image->flush(), Error);
    CHECK(all_are(read_some(*pair.image, 4096, 4096), 2));
}

TEST_CASE("A killed process leaves what was flushed, at every moment of what comes after") {
    for (const bool raw : {false, true}) {
        Pair pair(64 * 4096, 4096, raw);
        Bytes model(64 * 4096);
        pair.image->write(bytes_of(20 * 4096, 7), {4096});
        std::fill_n(model.begin() + 4096, 20 * 4096, std::byte{7});
        pair.image->flush();
        pair.image_disk->record();
        pair.data_disk->record();
        // Each of these leaves every byte as it was or as it should be, whichever of the two files got how far.
        pair.image->trim({8192}, 4096);
        pair.image->write(bytes_of(512, 9), {8192 + 512});
        pair.image->zero({5 * 4096}, 2 * 4096, Image::Zero::may_trim, false);
        pair.image->write(bytes_of(4096, 9), {40 * 4096});
        pair.image->flush();
        const Bytes after = read_all(*pair.image);
        pair.image.reset();
        const auto replay = [](const FaultyDisk &disk, std::size_t events) {
            Bytes bytes = disk.first_bytes();
            for (std::size_t i = 0; i < events; ++i) {
                const Event &e = disk.events()[i];
                if (e.kind == Event::Kind::length)
                    bytes.resize(e.at);
                if (e.kind != Event::Kind::write && e.kind != Event::Kind::zeroes)
                    continue;
                if (bytes.size() < e.at + e.length && e.kind == Event::Kind::write)
                    bytes.resize(e.at + std::max<std::uint64_t>(e.length, e.bytes.size()));
                for (std::uint64_t n = 0;
                     n < std::max<std::uint64_t>(e.length, e.bytes.size()) && e.at + n < bytes.size(); ++n)
                    bytes[e.at + n] = e.kind == Event::Kind::write ? e.bytes[n] : std::byte{0};
            }
            return bytes;
        };
        // A kill loses nothing of the data file that came before what the image has; a power cut may lose what was not
        // synced, and then the entries that need it are not there either: the test above.
        const auto data_events = pair.data_disk->events().size();
        for (std::size_t i = 0; i <= pair.image_disk->events().size(); ++i) {
            Pair cut(64 * 4096, 4096, raw);
            cut.image.reset();
            cut.image_disk = std::make_shared<FaultyDisk>(replay(*pair.image_disk, i));
            cut.data_disk = std::make_shared<FaultyDisk>(replay(*pair.data_disk, data_events));
            cut.open();
            const Bytes now = read_all(*cut.image);
            std::size_t wrong = 0;
            for (std::size_t b = 0; b < now.size(); ++b) {
                const bool trimmed_first = b >= 8192 + 512 && b < 8192 + 1024;
                wrong += now[b] != model[b] && now[b] != after[b] && !(trimmed_first && now[b] == std::byte{0});
            }
            INFO("after " << i << " events");
            CHECK(wrong == 0);
        }
    }
}

TEST_CASE("An entry that points elsewhere than to the guest's offset is damage, and nothing is read or written there") {
    Pair pair(64 * 4096, 4096, false);
    pair.image->write(bytes_of(3 * 4096, 5), {0});
    pair.image->close();
    const HostOffset table = pair.image->state().l1.table(0);
    pair.image.reset();
    Bytes bytes = pair.image_disk->bytes();
    CHECK(load_be<std::uint64_t>(bytes, table.value) == entry::copied); // offset 0, and data
    for (const std::uint64_t word :
         {entry::copied | 8192, entry::copied | std::uint64_t{1} << 50, entry::compressed | 4096}) {
        store_be<std::uint64_t>(bytes, table.value + 8, word);
        pair.image_disk = std::make_shared<FaultyDisk>(bytes);
        const Bytes before = pair.data_disk->bytes();
        try {
            pair.open();
        } catch (const Error &) {
            continue;
        }
        CHECK_THROWS_AS(read_some(*pair.image, 4096, 10), Error);
        CHECK_THROWS_AS(pair.image->write(bytes_of(10, 1), {4096}), Error);
        CHECK_THROWS_AS(pair.image->zero({4096}, 4096, Image::Zero::may_trim, false), Error);
        pair.image->trim({4096}, 4096);
        CHECK(pair.data_disk->bytes() == before);
        CHECK(all_are(read_some(*pair.image, 0, 4096), 5));
    }
}

TEST_CASE("Headers that lie about a data file are refused") {
    const auto refused = [](const Header &h) { return refusal([&] { require_sane_data_file(h, "disk.qcow2"); }); };
    Header header;
    CHECK(refused(header).empty());
    header.autoclear = Header::autoclear_data_file_raw;
    CHECK(says(refused(header), "no data file"));
    header.incompatible = Header::incompatible_data_file;
    CHECK(refused(header).empty());
    header.backing_file = "base";
    CHECK(says(refused(header), "backing file"));
    header.autoclear = 0;
    CHECK(refused(header).empty());
    header.snapshot_count = 1;
    CHECK(says(refused(header), "snapshots"));
}

TEST_CASE("The name of a data file") {
    const auto find = [](const std::string &name, const std::string &chosen = "") {
        return find_data_file(with_name(name), "/nowhere/disk.qcow2", chosen);
    };
    CHECK(find("/abs/x.raw") == "/abs/x.raw");
    CHECK(find("file:/abs/x.raw") == "/abs/x.raw");
    CHECK(find("/abs/a:b") == "/abs/a:b");
    CHECK(find("whatever", "/abs/chosen") == "/abs/chosen");
    CHECK(says(refusal([&] { find("nbd://host/x"); }), "nbd://host/x"));
    CHECK(says(refusal([&] { find("json:{}"); }), "json:{}"));
    CHECK(says(refusal([&] { find(std::string("a\0b", 3)); }), "control characters"));
    CHECK(says(refusal([&] { find("no-such-file-anywhere"); }), "neither"));
    CHECK(says(refusal([&] { find(""); }), "does not say which"));
}

TEST_CASE("The end of the disk completes the last block of a trim") {
    // The filter counts a trim up to the end of the disk as covering the last block: the image must not keep a part of
    // it.
    const std::uint64_t size = 3 * 65536 + 8192 + 512;
    const auto disk = std::make_shared<FaultyDisk>(empty_image(size, 65536));
    const auto image = open_image(disk);
    image->write(bytes_of(size, 5), {0});
    image->trim({size - 512 - 4096}, 4096 + 512);
    CHECK(all_are(read_some(*image, size - 4096 - 512, 4096 + 512), 0));
    CHECK(all_are(read_some(*image, size - 4096 - 513, 1), 5));
}
