// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Compressed clusters: descriptors of every cluster size, both codecs on good and on hostile input, and the clusters
// kept in memory.
#include "lib/compressed_clusters.h"
#include "lib/error.h"
#include "lib/l2_entry.h"
#include "tests/catch.h"
#include "tests/fault/faulty_file.h"

#include <random>
#include <thread>
#include <zlib.h>
#include <zstd.h>

using namespace qlean;

namespace {

using Bytes = std::vector<std::byte>;

/// Compresses as QEMU does.
Bytes compress(Compression type, std::span<const std::byte> cluster) {
    Bytes out(cluster.size() * 2 + 1024);
    if (type == Compression::zstd) {
        out.resize(ZSTD_compress(out.data(), out.size(), cluster.data(), cluster.size(), 3));
        return out;
    }
    z_stream stream{};
    REQUIRE(deflateInit2(&stream, Z_DEFAULT_COMPRESSION, Z_DEFLATED, -12, 9, Z_DEFAULT_STRATEGY) == Z_OK);
    stream.next_in = reinterpret_cast<Bytef *>(const_cast<std::byte *>(cluster.data()));
    stream.avail_in = static_cast<uInt>(cluster.size());
    stream.next_out = reinterpret_cast<Bytef *>(out.data());
    stream.avail_out = static_cast<uInt>(out.size());
    REQUIRE(deflate(&stream, Z_FINISH) == Z_STREAM_END);
    out.resize(stream.total_out);
    deflateEnd(&stream);
    return out;
}

/// Something that compresses to about a third.
Bytes text(std::size_t size, unsigned seed) {
    std::mt19937 random(seed);
    Bytes bytes(size);
    for (auto &b : bytes)
        b = std::byte(random() % 3 == 0 ? random() % 256 : 'a');
    return bytes;
}

} // namespace

TEST_CASE("Descriptors of compressed clusters say where and how many sectors, for every cluster size") {
    // What QEMU wrote for an extent at 0x50003 of two sectors in an image of 64 KiB clusters.
    const auto known = entry::compressed_extent(std::uint64_t{1} << 54 | 0x50003, 16);
    CHECK(known.at == HostOffset{0x50003});
    CHECK(known.bytes == 1024 - 3);
    std::mt19937_64 random(1);
    for (unsigned bits = 9; bits <= 21; ++bits) {
        const Geometry g(bits, 4, std::uint64_t{1} << 30);
        const std::uint64_t most = std::uint64_t{1} << std::min(62 - (bits - 8), 56u);
        for (int i = 0; i < 2000; ++i) {
            const HostOffset at{random() % (i % 2 == 0 ? most : std::uint64_t{1} << 30)};
            const std::uint64_t length = random() % g.cluster_size() + 1;
            const auto word = compression::describe(at, length, bits);
            REQUIRE(word);
            CHECK(*word < entry::compressed);
            const CompressedExtent extent = entry::compressed_extent(*word, bits);
            CHECK(extent.at == at);
            CHECK(extent.bytes >= length);
            CHECK((extent.at + extent.bytes).value == round_up(at.value + length, 512));
            CHECK(extent.bytes <= compression::max_length(bits));
        }
        CHECK_FALSE(compression::describe({std::uint64_t{1} << (62 - (bits - 8))}, 1, bits));
        CHECK_FALSE(compression::describe({0}, 0, bits));
        CHECK_FALSE(compression::describe({0}, compression::max_length(bits) + 1, bits));
        CHECK_FALSE(compression::describe({511}, compression::max_length(bits), bits));
        CHECK(entry::compressed_extent(~std::uint64_t{0}, bits).bytes <= compression::max_length(bits));
    }
}

TEST_CASE("Decompressing fills a cluster and tells the exact length, whatever follows") {
    for (const auto type : {Compression::deflate, Compression::zstd})
        for (const std::size_t size : {512u, 65536u, 2097152u}) {
            const Bytes cluster = text(size, 7);
            Bytes from = compress(type, cluster);
            const std::size_t exact = from.size();
            Bytes into(size);
            auto result = compression::decompress(type, from, into);
            CHECK(result.filled);
            CHECK(result.length == exact);
            CHECK(into == cluster);
            const Bytes more = text(700, 9); // the next extent begins in the same sector
            from.insert(from.end(), more.begin(), more.end());
            result = compression::decompress(type, from, into);
            CHECK(result.filled);
            CHECK(result.length == exact);
            CHECK(into == cluster);
            CHECK_FALSE(compression::decompress(type, std::span(from).first(exact / 2), into).filled);
            Bytes larger(size + 1);
            CHECK_FALSE(compression::decompress(type, std::span(from).first(exact), larger).filled);
        }
}

TEST_CASE("A deflate stream that would go on fills the cluster, as for QEMU, and has no length") {
    const Bytes cluster = text(65536, 3);
    const Bytes from = compress(Compression::deflate, cluster);
    Bytes into(4096);
    const auto result = compression::decompress(Compression::deflate, from, into);
    CHECK(result.filled);
    CHECK_FALSE(result.length);
    CHECK(std::equal(into.begin(), into.end(), cluster.begin()));
    CHECK_FALSE(compression::decompress(Compression::zstd, compress(Compression::zstd, cluster), into).filled);
}

TEST_CASE("Hostile compressed bytes are refused, or give some cluster; nothing else happens") {
    std::mt19937 random(5);
    for (const auto type : {Compression::deflate, Compression::zstd}) {
        const Bytes cluster = text(4096, 1);
        const Bytes good = compress(type, cluster);
        Bytes into(4096);
        for (int i = 0; i < 20000; ++i) {
            Bytes bad = good;
            if (i % 4 == 0)
                for (auto &b : bad)
                    b = std::byte(random() % 256);
            for (int n = 0; n < 1 + i % 5; ++n)
                bad[random() % bad.size()] = std::byte(random() % 256);
            bad.resize(random() % bad.size() + 1);
            const auto result = compression::decompress(type, bad, into);
            CHECK((!result.length || *result.length <= bad.size()));
        }
    }
    // A frame that claims a window of 2 GiB costs no memory.
    Bytes huge{std::byte{0x28}, std::byte{0xb5}, std::byte{0x2f}, std::byte{0xfd}, std::byte{0x00}, std::byte{0xa8}};
    huge.resize(64);
    Bytes into(4096);
    CHECK_FALSE(compression::decompress(Compression::zstd, huge, into).filled);
    CHECK_FALSE(compression::decompress(Compression::zstd, {}, into).filled);
    CHECK_FALSE(compression::decompress(Compression::deflate, {}, into).filled);
}

TEST_CASE("A compressed cluster is decompressed once for reads that follow each other, also from many threads") {
    const Geometry g(16, 4, std::uint64_t{1} << 24);
    const auto disk = std::make_shared<fault::FaultyDisk>(Bytes(1 << 20));
    fault::FaultyFile file(disk);
    std::vector<Bytes> clusters;
    std::vector<std::uint64_t> words;
    std::uint64_t at = 3;
    for (unsigned i = 0; i < 8; ++i) {
        clusters.push_back(text(g.cluster_size(), i));
        const Bytes bytes = compress(Compression::deflate, clusters.back());
        file.write(bytes, HostOffset{at});
        words.push_back(*compression::describe({at}, bytes.size(), 16));
        at += bytes.size();
    }
    CompressedClusters compressed(g, Compression::deflate, file);
    const auto is_right = [&](unsigned i, std::uint64_t within, std::size_t length) {
        Bytes into(length);
        compressed.read({i}, words[i], within, into);
        return std::equal(into.begin(), into.end(), clusters[i].begin() + static_cast<std::ptrdiff_t>(within));
    };
    std::atomic<unsigned> wrong{0};
    std::vector<std::thread> threads;
    for (unsigned t = 0; t < 4; ++t)
        threads.emplace_back([&] {
            for (unsigned i = 0; i < 8; ++i)
                for (std::uint64_t within = 0; within < g.cluster_size(); within += 4096)
                    wrong += !is_right(i, within, 4096);
        });
    for (auto &thread : threads)
        thread.join();
    CHECK(wrong == 0);
    CHECK(compressed.decompressed() == 8);
    CHECK(compressed.memory_bytes() == 8 * g.cluster_size());
    CHECK(is_right(3, 0, g.cluster_size())); // whole, and in memory
    CHECK(compressed.decompressed() == 8);

    // Another entry of the same guest cluster is another cluster; what is forgotten is read again.
    std::swap(words[0], words[1]);
    std::swap(clusters[0], clusters[1]);
    CHECK(is_right(0, 0, g.cluster_size()));
    CHECK(is_right(0, 5, 10));
    CHECK(compressed.decompressed() == 10);
    compressed.forget({0});
    CHECK(is_right(0, 5, 10));
    CHECK(compressed.decompressed() == 11);

    // Memory is bounded.
    for (unsigned i = 0; i < 2000; ++i) {
        Bytes into(1);
        compressed.read({1000 + i}, words[2], 0, into);
    }
    CHECK(compressed.memory_bytes() <= 16 * 1024 * 1024);

    // What does not decompress says so each time, and is not kept.
    file.write(Bytes(g.cluster_size(), std::byte{0xff}), HostOffset{1 << 19});
    const auto bad = *compression::describe({1 << 19}, 1000, 16);
    Bytes into(16);
    for (int i = 0; i < 2; ++i)
        CHECK_THROWS_AS(compressed.read({50}, bad, 0, into), Error);
}
