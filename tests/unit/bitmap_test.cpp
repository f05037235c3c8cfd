// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Persistent bitmaps, the parts without I/O: the directory is decoded or refused with a sentence, whatever its bytes
// are; bits set in memory are the bits that a plain array has.
#include "lib/bitmap_directory.h"
#include "lib/byte_order.h"
#include "lib/dirty_bits.h"
#include "lib/error.h"
#include "tests/catch.h"

#include <random>
#include <set>
#include <thread>

using namespace qlean;

namespace {

constexpr const char *name = "disk.qcow2";
const Geometry geometry(16, 4, std::uint64_t{1} << 30);

struct Raw {
    std::uint64_t table = 0x50000;
    std::uint32_t table_size = 1, flags = BitmapEntry::flag_auto;
    std::uint8_t type = 1, granularity = 16;
    std::uint32_t extra = 0;
    std::string name = "one";
};

void append(std::vector<std::byte> &to, const Raw &raw) {
    const std::size_t at = to.size();
    to.resize(at + round_up(24 + raw.name.size(), 8));
    store_be<std::uint64_t>(to, at, raw.table);
    store_be<std::uint32_t>(to, at + 8, raw.table_size);
    store_be<std::uint32_t>(to, at + 12, raw.flags);
    to[at + 16] = std::byte{raw.type};
    to[at + 17] = std::byte{raw.granularity};
    store_be<std::uint16_t>(to, at + 18, static_cast<std::uint16_t>(raw.name.size()));
    store_be<std::uint32_t>(to, at + 20, raw.extra);
    std::memcpy(to.data() + at + 24, raw.name.data(), raw.name.size());
}

std::string refusal(const std::vector<std::byte> &bytes, std::uint32_t count) {
    try {
        parse_bitmap_directory(bytes, count, geometry, name);
    } catch (const Error &error) {
        CHECK(error.kind() == Error::Kind::bad_image);
        return error.what();
    }
    return {};
}

template <class Change>
std::string refusal_of(Change &&change) {
    Raw raw;
    change(raw);
    std::vector<std::byte> bytes;
    append(bytes, raw);
    return refusal(bytes, 1);
}

bool about(const std::string &text, const std::string &what) {
    INFO(text);
    return text.find(what) != std::string::npos && text.find(name) != std::string::npos;
}

} // namespace

TEST_CASE("A bitmap directory is decoded") {
    std::vector<std::byte> bytes;
    append(bytes, {});
    Raw second;
    second.name = "a longer name";
    second.flags = BitmapEntry::flag_in_use;
    second.table_size = 77; // left over from another size of the disk
    second.granularity = 9;
    append(bytes, second);
    const auto entries = parse_bitmap_directory(bytes, 2, geometry, name);
    REQUIRE(entries.size() == 2);
    CHECK(entries[0].at == 0);
    CHECK(entries[0].name == "one");
    CHECK(entries[0].table == HostOffset{0x50000});
    CHECK(entries[0].tracked());
    CHECK(entries[1].at == 32);
    CHECK(entries[1].name == "a longer name");
    CHECK_FALSE(entries[1].tracked());
    CHECK(entries[1].in_use());
    CHECK(entries[1].granularity_bits == 9);
}

TEST_CASE("What QEMU does not accept of a bitmap directory is refused with a sentence") {
    CHECK(refusal_of([](Raw &) {}).empty());
    CHECK(about(refusal_of([](Raw &r) { r.type = 2; }), "unknown type"));
    CHECK(about(refusal_of([](Raw &r) { r.flags = 4; }), "unknown flags"));
    CHECK(about(refusal_of([](Raw &r) { r.granularity = 8; }), "granularity"));
    CHECK(about(refusal_of([](Raw &r) { r.granularity = 32; }), "granularity"));
    CHECK(about(refusal_of([](Raw &r) { r.table_size = 0; }), "size"));
    CHECK(about(refusal_of([](Raw &r) { r.table_size = 2; }), "wrong size"));
    CHECK(about(refusal_of([](Raw &r) { r.table_size = 0xffffffff; }), "impossible size"));
    CHECK(about(refusal_of([](Raw &r) { r.table = 0; }), "offset"));
    CHECK(about(refusal_of([](Raw &r) { r.table = 0x50200; }), "offset"));
    CHECK(about(refusal_of([](Raw &r) { r.table = 0xffffffffffff0000; }), "offset"));
    CHECK(about(refusal_of([](Raw &r) { r.extra = 8; }), "extra data"));
    CHECK(about(refusal_of([](Raw &r) { r.name = std::string(1024, 'x'); }), "does not fit"));
    std::vector<std::byte> bytes;
    append(bytes, {});
    CHECK(about(refusal(bytes, 2), "has 1 entries"));
    CHECK(about(refusal({bytes.begin(), bytes.begin() + 20}, 1), "ends within"));
    CHECK(about(refusal({bytes.begin(), bytes.begin() + 24}, 1), "does not fit"));
    append(bytes, {});
    CHECK(about(refusal(bytes, 1), "more entries"));
    CHECK(about(refusal(bytes, 2), "called 'one'"));
}

TEST_CASE("The bitmaps header extension is decoded or refused") {
    std::vector<std::byte> data(24);
    store_be<std::uint32_t>(data, 0, 3);
    store_be<std::uint64_t>(data, 8, 96);
    store_be<std::uint64_t>(data, 16, 0xc0000);
    const auto e = BitmapsExtension::parse(data, geometry, name);
    CHECK(e.count == 3);
    CHECK(e.directory_bytes == 96);
    CHECK(e.directory == HostOffset{0xc0000});
    const auto refused = [&](std::size_t at, std::uint64_t value, std::size_t bytes) {
        auto changed = data;
        if (bytes == 4)
            store_be<std::uint32_t>(changed, at, static_cast<std::uint32_t>(value));
        else
            store_be<std::uint64_t>(changed, at, value);
        CHECK_THROWS_AS(BitmapsExtension::parse(changed, geometry, name), Error);
    };
    refused(0, 0, 4);
    refused(0, 65536, 4);
    refused(4, 1, 4);
    refused(8, 0, 8);
    refused(8, (64 << 20) + 1, 8);
    refused(16, 0, 8);
    refused(16, 0xc0200, 8);
    refused(16, std::uint64_t{1} << 60, 8);
    CHECK_THROWS_AS(BitmapsExtension::parse(std::span(data).first(16), geometry, name), Error);
}

TEST_CASE("No bytes of a bitmap directory do worse than to be refused") {
    std::mt19937_64 random(20261121);
    std::vector<std::byte> good;
    append(good, {});
    Raw second;
    second.name = "second bitmap";
    append(good, second);
    for (int i = 0; i < 20000; ++i) {
        auto bytes = good;
        for (unsigned n = random() % 4 + 1; n-- > 0;)
            bytes[random() % bytes.size()] = std::byte(random());
        bytes.resize(random() % 4 ? bytes.size() : random() % (bytes.size() + 40));
        try {
            for (const BitmapEntry &e : parse_bitmap_directory(bytes, 2, geometry, name))
                CHECK(e.table_bytes() <= BitmapEntry::max_bitmap_bytes / 8);
        } catch (const Error &) {
        }
    }
}

TEST_CASE("The words of a bitmap table") {
    using Kind = BitmapWord::Kind;
    CHECK(BitmapWord::decode(0, geometry).kind == Kind::zeroes);
    CHECK(BitmapWord::decode(1, geometry).kind == Kind::ones);
    CHECK(BitmapWord::decode(0x50000, geometry).kind == Kind::stored);
    CHECK(BitmapWord::decode(0x50000, geometry).host == HostCluster{5});
    for (const std::uint64_t word : {0x50001ull, 0x50200ull, 2ull, 0x8000000000050000ull})
        CHECK(BitmapWord::decode(word, geometry).kind == Kind::damaged);
}

TEST_CASE("Bits that were set are the bits of a plain array, from several threads") {
    constexpr std::uint64_t bits = 100'003;
    for (const std::uint64_t piece : {512ull, 4096ull, 65536ull}) {
        DirtyBits dirty(bits);
        std::vector<bool> model(round_up(bits, piece * 8));
        std::mt19937_64 random(piece);
        std::vector<std::pair<std::uint64_t, std::uint64_t>> ranges;
        for (int i = 0; i < 40; ++i) {
            const std::uint64_t first = random() % bits, last = first + random() % 300;
            ranges.emplace_back(first, last);
            for (std::uint64_t b = first; b <= std::min(last, bits - 1); ++b)
                model[b] = true;
        }
        std::vector<std::thread> threads;
        for (unsigned t = 0; t < 4; ++t)
            threads.emplace_back([&, t] {
                for (std::size_t i = 0; i < ranges.size(); ++i)
                    if (i % 4 == t || i % 3 == 0)
                        dirty.set(ranges[i].first, ranges[i].second);
            });
        for (auto &t : threads)
            t.join();
        std::set<std::uint64_t> touched;
        dirty.each_touched(piece, [&](std::uint64_t i) { touched.insert(i); });
        for (std::uint64_t i = 0; i < model.size() / 8 / piece; ++i) {
            std::vector<std::byte> bytes(piece);
            dirty.merge_into(bytes, i * piece);
            bool any = false, equal = true;
            for (std::uint64_t b = 0; b < piece * 8; ++b) {
                const bool is = (bytes[b / 8] >> (b % 8) & std::byte{1}) != std::byte{0};
                equal = equal && is == model[i * piece * 8 + b];
                any = any || is;
            }
            CHECK(equal);
            CHECK(touched.contains(i) == any);
        }
    }
}
