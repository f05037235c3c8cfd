// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The header: what is decoded, what is refused and with which sentence, what survives an update, and that no sequence
// of bytes does worse than to be refused.
#include "lib/byte_order.h"
#include "lib/error.h"
#include "lib/header.h"
#include "tests/catch.h"
#include "tests/fault/scene.h"

#include <random>

using namespace qlean;

namespace {

constexpr const char *name = "disk.qcow2";

Header sample(unsigned version = 3) {
    Header h;
    h.version = version;
    h.header_length = version == 2 ? 72 : 104;
    h.cluster_bits = 16;
    h.virtual_size = std::uint64_t{1} << 30;
    h.l1_size = 2;
    h.l1_offset = {0x30000};
    h.refcount_table_offset = {0x10000};
    h.refcount_table_clusters = 1;
    return h;
}

std::vector<std::byte> encoded(const Header &h, std::size_t size = 65536) {
    auto bytes = h.encode();
    bytes.resize(size);
    return bytes;
}

/// The sentence with which the bytes are refused, by parse() or by require_supported(); empty: they are not.
std::string refusal(const std::vector<std::byte> &bytes) {
    try {
        Header::parse(bytes, name).require_supported(name);
    } catch (const Error &error) {
        return error.what();
    }
    return {};
}

/// One sentence that names the file and has this in it.
void require_refused(const std::vector<std::byte> &bytes, const std::string &about) {
    const std::string text = refusal(bytes);
    INFO("\"" << text << "\" should be about \"" << about << "\"");
    CHECK(text.find(about) != std::string::npos);
    CHECK(text.find(name) != std::string::npos);
    CHECK(text.find('\n') == std::string::npos);
}

template <class T>
std::vector<std::byte> with(std::size_t at, T value, unsigned version = 3) {
    auto bytes = encoded(sample(version));
    store_be<T>(bytes, at, value);
    return bytes;
}
constexpr auto u32 = [](std::uint64_t n) { return static_cast<std::uint32_t>(n); };

} // namespace

TEST_CASE("What was encoded is decoded, in both versions") {
    for (const unsigned version : {2u, 3u}) {
        Header h = sample(version);
        if (version == 3) {
            h.compatible = 1;
            h.autoclear = 0x10;
        }
        h.extensions.push_back({0x11223344, std::vector<std::byte>(5, std::byte{7})});
        h.extensions.push_back({Header::extension_feature_names, std::vector<std::byte>(48)});
        const Header d = Header::parse(encoded(h), name);
        CHECK(d.version == version);
        CHECK(d.cluster_bits == 16);
        CHECK(d.virtual_size == h.virtual_size);
        CHECK(d.l1_size == 2);
        CHECK(d.l1_offset.value == 0x30000);
        CHECK(d.refcount_table_offset.value == 0x10000);
        CHECK(d.refcount_table_clusters == 1);
        CHECK(d.compatible == h.compatible);
        CHECK(d.autoclear == h.autoclear);
        CHECK(d.refcount_order == 4);
        REQUIRE(d.extensions.size() == 2);
        CHECK(d.extensions[0].type == 0x11223344);
        CHECK(d.extensions[0].data.size() == 5);
        CHECK(d.has_unknown_extension());
        CHECK(refusal(encoded(h)) == "");
    }
    CHECK_FALSE(Header::parse(encoded(sample()), name).has_unknown_extension());
    for (std::uint32_t order = 0; order <= 6; ++order) {
        CHECK(Header::parse(with(96, order), name).refcount_order == order);
        CHECK(refusal(with(96, order)) == "");
    }
}

TEST_CASE("An update changes the fields it knows and no other byte") {
    for (const unsigned version : {2u, 3u}) {
        auto bytes = encoded(sample(version), 512);
        for (std::size_t i = version == 2 ? 72 : 104; i < 512; ++i)
            bytes[i] = std::byte(i);
        store_be<std::uint64_t>(bytes, 8, 0x123); // backing file fields
        store_be<std::uint32_t>(bytes, 16, 0x45);
        auto before = bytes;
        Header h = sample(version);
        h.l1_offset = {0x770000};
        h.refcount_table_offset = {0x880000};
        h.update(bytes);
        CHECK(load_be<std::uint64_t>(bytes, 40) == 0x770000);
        CHECK(load_be<std::uint64_t>(bytes, 48) == 0x880000);
        store_be<std::uint64_t>(before, 40, 0x770000);
        store_be<std::uint64_t>(before, 48, 0x880000);
        CHECK((bytes == before));
        CHECK(h.fixed_length() == (version == 2 ? 72u : 104u));
    }
}

TEST_CASE("What is no image, or a damaged one, is refused with a sentence") {
    require_refused({}, "not a QCOW2 image");
    require_refused(std::vector<std::byte>(65536), "not a QCOW2 image");
    require_refused(encoded(sample(), 71), "not a QCOW2 image");
    require_refused(encoded(sample(), 80), "header is incomplete");
    require_refused(with(4, u32(1)), "version 1");
    require_refused(with(4, u32(4)), "version 4");
    require_refused(with(20, u32(8)), "cluster size");
    require_refused(with(20, u32(22)), "cluster size");
    require_refused(with(20, u32(0xffffffff)), "cluster size");
    require_refused(with(24, ~std::uint64_t{0}), "impossible");
    require_refused(with(24, std::uint64_t{1} << 50), "L1 table has 2 entries");
    require_refused(with(36, u32(1)), "L1 table has 1 entries");
    require_refused(with(36, u32(0xffffffff)), "exceeds 32 MiB");
    require_refused(with(40, std::uint64_t{0x30200}), "not a cluster boundary");
    require_refused(with(40, std::uint64_t{0}), "impossible offset");
    require_refused(with(40, ~std::uint64_t{0xffff}), "impossible offset");
    require_refused(with(48, std::uint64_t{0x10001}), "not a cluster boundary");
    require_refused(with(48, std::uint64_t{0}), "impossible offset");
    require_refused(with(56, u32(0)), "no refcount table");
    require_refused(with(56, u32(0xffffffff)), "exceeds 8 MiB");
    require_refused(with(96, u32(7)), "refcount width");
    require_refused(with(100, u32(103)), "header length");
    require_refused(with(100, u32(108)), "header length");
    require_refused(with(100, u32(0x20000)), "header length");
    require_refused(with(100, u32(0)), "header length");
    auto extension = with(104, u32(0x12345678)); // an extension that does not fit
    store_be<std::uint32_t>(extension, 108, 0xfffffff0u);
    require_refused(extension, "does not fit");
    auto backing = with(8, std::uint64_t{65530});
    store_be<std::uint32_t>(backing, 16, 100);
    require_refused(backing, "backing file name");
    backing = with(8, ~std::uint64_t{0});
    store_be<std::uint32_t>(backing, 16, 100);
    require_refused(backing, "backing file name");
    backing = with(8, std::uint64_t{200});
    store_be<std::uint32_t>(backing, 16, 1024);
    require_refused(backing, "backing file name");
}

TEST_CASE("Extended L2 entries halve what a table holds, and need large clusters") {
    Header extended = sample();
    extended.incompatible = Header::incompatible_extended_l2;
    require_refused(encoded(extended), "needs 4");
    extended.l1_size = 4;
    CHECK(refusal(encoded(extended)).empty());
    extended.cluster_bits = 13;
    require_refused(encoded(extended), "extended L2 entries need clusters of 16384 bytes");
}

TEST_CASE("What is not supported is refused by name") {
    CHECK(refusal(with(72, std::uint64_t{3})) == ""); // dirty and corrupt: marks, not features
    require_refused(with(72, std::uint64_t{32}), "feature bit 5");
    require_refused(with(72, std::uint64_t{1} << 63), "feature bit 63");
    Header zstd = sample();
    zstd.header_length = 112;
    zstd.incompatible = Header::incompatible_compression;
    auto bytes = encoded(zstd);
    bytes[104] = std::byte{1};
    Header::parse(bytes, "test").require_supported("test");
    bytes[104] = std::byte{2};
    require_refused(bytes, "compression type 2");
    bytes[104] = std::byte{0}; // deflate, and a bit that says that it is not
    require_refused(bytes, "compression type is 0");
    require_refused(with(32, std::uint32_t{3}), "encryption method 3");
    require_refused(with(32, std::uint32_t{2}), "does not say where");
    Header plain = sample();
    plain.extensions.push_back({Header::extension_encryption, std::vector<std::byte>(16)});
    require_refused(encoded(plain), "not encrypted with LUKS");
}

TEST_CASE("What an error says holds no control characters, whatever an image or a client calls something") {
    const Error error(Error::Kind::unsupported, ENOENT, "there is no export '\x1b[31m\n\x7f'");
    CHECK(std::string(error.what()) == "there is no export '?[31m?"
                                       "?'");
}

TEST_CASE("An unknown feature is called what the image calls it, without its control characters") {
    Header h = sample();
    h.incompatible = 1u << 9;
    std::vector<std::byte> table(96);
    table[48 + 1] = std::byte{9};
    const std::string text = "new\x1b thing";
    std::memcpy(table.data() + 48 + 2, text.data(), text.size());
    h.extensions.push_back({Header::extension_feature_names, table});
    require_refused(encoded(h), "'new? thing'");
    require_refused(encoded(h), "bit 9");
}

TEST_CASE("No header does worse than to be refused") {
    const std::uint64_t seed = fault::fresh_seed();
    INFO("QLEAN_SEED=" << seed);
    std::mt19937_64 random(seed);
    int accepted = 0;
    for (int i = 0; i < 20000; ++i) {
        Header h = sample(i % 2 ? 3 : 2);
        if (random() % 2)
            h.extensions.push_back({u32(random()), std::vector<std::byte>(random() % 100)});
        auto bytes = encoded(h, 1 + random() % 700);
        for (auto n = random() % 6; n > 0; --n) {
            const std::size_t at = random() % std::min<std::size_t>(bytes.size(), 160);
            bytes[at] = random() % 2 ? std::byte(random()) : std::byte(1u << random() % 8);
        }
        try {
            const Header d = Header::parse(bytes, name);
            d.require_supported(name);
            ++accepted;
            REQUIRE(d.l1_size >= d.geometry().l1_entries());
            REQUIRE(d.l1_offset.value % d.geometry().cluster_size() == 0);
        } catch (const Error &error) {
            REQUIRE(std::string(error.what()).find(name) != std::string::npos);
        }
    }
    CHECK(accepted > 100);
}
