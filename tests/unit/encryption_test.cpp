// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Encryption by itself: the cipher against published and openssl-made bytes, the encrypting file against a byte array,
// and headers that lie.
#include "lib/byte_order.h"
#include "lib/encrypted_file.h"
#include "lib/error.h"
#include "lib/luks.h"
#include "tests/catch.h"
#include "tests/fault/faulty_file.h"
#include "tests/fault/scene.h"

#include <random>
#include <thread>

using namespace qlean;
using namespace qlean::fault;

namespace {

Secret key_of(std::size_t size) {
    Secret key(size);
    for (std::size_t i = 0; i < size; ++i)
        key.bytes()[i] = std::byte(i * 7 + 1);
    return key;
}

SectorCipher cipher(const char *mode = "xts-plain64", std::size_t key = 64) {
    return {"aes", mode, key_of(key), "test"};
}

Secret from_hex(const std::string &hex) {
    Secret key(hex.size() / 2);
    for (std::size_t i = 0; i < key.size(); ++i)
        key.bytes()[i] = std::byte(std::stoul(hex.substr(2 * i, 2), nullptr, 16));
    return key;
}

std::string to_hex(std::span<const std::byte> bytes) {
    std::string text;
    for (const std::byte b : bytes)
        text += fmt::format("{:02x}", std::to_integer<unsigned>(b));
    return text;
}

} // namespace

TEST_CASE("AES-XTS is what IEEE 1619 says (its vector 4)") {
    const SectorCipher xts("aes", "xts-plain64",
                           from_hex("2718281828459045235360287471352631415926535897932384626433832795"), "test");
    Bytes plain(512), encrypted(512);
    for (std::size_t i = 0; i < 512; ++i)
        plain[i] = std::byte(i);
    xts.encrypt(plain, encrypted, 0);
    CHECK(to_hex(std::span(encrypted).first(32)) == "27a7479befa1d476489f308cd4cfa6e2a96e4bbe3208ff25287dd3819616e89c");
    xts.decrypt(encrypted, encrypted, 0);
    CHECK(encrypted == plain);
}

TEST_CASE("Each sector has its own vector, by its number; every mode gives back what it was given") {
    const auto [mode, key] = GENERATE(table<const char *, int>({{"xts-plain64", 64},
                                                                {"xts-plain64", 32},
                                                                {"xts-plain", 64},
                                                                {"xts-essiv:sha256", 64},
                                                                {"cbc-plain64", 32},
                                                                {"cbc-plain", 24},
                                                                {"cbc-essiv:sha256", 16},
                                                                {"cbc-essiv:sha256", 32}}));
    INFO(mode << " " << key);
    const SectorCipher c = cipher(mode, static_cast<std::size_t>(key));
    const Bytes plain = bytes_of(4 * 512, 0x5a);
    Bytes one(plain.size()), other(plain.size());
    c.encrypt(plain, one, 1000);
    CHECK_FALSE(std::equal(one.begin(), one.begin() + 512, one.begin() + 512));
    c.encrypt(plain, other, 1001);
    CHECK(std::equal(one.begin() + 512, one.end(), other.begin()));
    const std::uint64_t far = (std::uint64_t{1} << 32) + 1000;
    c.encrypt(plain, other, far);
    const bool wraps =
        std::string(mode).find("plain64") == std::string::npos && std::string(mode).find("essiv") == std::string::npos;
    CHECK((one == other) == wraps); // "plain" knows 32 bits
    c.decrypt(other, other, far);
    CHECK(other == plain);
}

TEST_CASE("A cipher that we do not have is refused by its name") {
    const auto refused = [](const char *name, const char *mode, std::size_t key) {
        try {
            SectorCipher(name, mode, key_of(key), "disk.qcow2");
        } catch (const Error &error) {
            CHECK(error.kind() == Error::Kind::unsupported);
            CHECK(std::string(error.what()).find(fmt::format("{}-{}", name, mode)) != std::string::npos);
            return true;
        }
        return false;
    };
    CHECK(refused("twofish", "xts-plain64", 64));
    CHECK(refused("aes", "ecb", 32));
    CHECK(refused("aes", "ctr-plain64", 32));
    CHECK(refused("aes", "xts-plain64", 48));
    CHECK(refused("aes", "cbc-benbi", 32));
    CHECK(refused("aes", "cbc-essiv:md5", 32));
}

TEST_CASE("The encrypting file reads what was written, at any alignment, and holds no plain text") {
    const std::uint64_t seed = fresh_seed();
    INFO("QLEAN_SEED=" << seed);
    std::mt19937_64 random(seed);
    constexpr std::size_t size = 700 * 1024;
    const auto disk = std::make_shared<FaultyDisk>(Bytes(size));
    FaultyFile below(disk);
    EncryptedFile file(below, cipher());
    Bytes model = bytes_of(size, 0x41);
    file.write(model, {0});
    for (int i = 0; i < 600; ++i) {
        const std::uint64_t at = random() % size;
        const std::uint64_t n = std::min<std::uint64_t>(1 + random() % (i % 5 == 0 ? 400000 : 2000), size - at);
        if (random() % 2) {
            const Bytes bytes = bytes_of(n, static_cast<unsigned>(random() % 256));
            file.write(bytes, {at});
            std::copy(bytes.begin(), bytes.end(), model.begin() + static_cast<std::ptrdiff_t>(at));
        } else {
            Bytes bytes(n);
            file.read(bytes, {at});
            REQUIRE(std::equal(bytes.begin(), bytes.end(), model.begin() + static_cast<std::ptrdiff_t>(at)));
        }
    }
    Bytes all(size);
    file.read(all, {0});
    CHECK(all == model);
    const Bytes cipher_text = disk->bytes();
    const Bytes run = bytes_of(16, 0x41);
    CHECK(std::search(cipher_text.begin(), cipher_text.end(), run.begin(), run.end()) == cipher_text.end());
    CHECK_FALSE(file.punch({0}, 4096));
    CHECK_FALSE(file.zero_keeping_space({0}, 4096));
    CHECK(file.next_data({4096}) == HostOffset{4096});
}

TEST_CASE("Writers side by side in one sector lose nothing of each other") {
    const auto disk = std::make_shared<FaultyDisk>(Bytes(4096));
    FaultyFile below(disk);
    EncryptedFile file(below, cipher());
    file.write(Bytes(4096), {0});
    constexpr unsigned writers = 4, each = 100, rounds = 500;
    std::vector<std::thread> threads;
    std::atomic<unsigned> lost{0};
    for (unsigned w = 0; w < writers; ++w)
        threads.emplace_back([&, w] {
            Bytes seen(each);
            for (unsigned i = 1; i <= rounds; ++i) {
                const Bytes mine = bytes_of(each, i & 0xff);
                file.write(mine, {w * each});
                file.read(seen, {w * each});
                lost += seen != mine;
            }
        });
    for (auto &thread : threads)
        thread.join();
    CHECK(lost == 0);
}

TEST_CASE("A LUKS header that lies about itself is refused") {
    const Geometry geometry(16, 4, 1 << 20);
    const auto pointer = [&](std::uint64_t at, std::uint64_t length) {
        Bytes bytes(16);
        store_be<std::uint64_t>(bytes, 0, at);
        store_be<std::uint64_t>(bytes, 8, length);
        return LuksPointer::parse(bytes, geometry, "disk.qcow2");
    };
    CHECK(pointer(0x40000, 0x1f9000).run(geometry) == HostRun{{4}, 32});
    CHECK_THROWS_AS(pointer(0, 0x1f9000), Error);
    CHECK_THROWS_AS(pointer(0x40200, 0x1f9000), Error);
    CHECK_THROWS_AS(pointer(0x40000, 0), Error);
    CHECK_THROWS_AS(pointer(0x40000, ~std::uint64_t{0}), Error);
    CHECK_THROWS_AS(pointer(~std::uint64_t{0xffff}, 0x1f9000), Error);
    CHECK_THROWS_AS(LuksPointer::parse(Bytes(8), geometry, "disk.qcow2"), Error);
    CHECK_THROWS_AS(unlock_luks(Bytes(592), Secret("x"), "disk.qcow2"), Error);
    CHECK_THROWS_AS(unlock_luks(Bytes(100), Secret("x"), "disk.qcow2"), Error);
    Bytes slow(592);
    for (std::size_t slot = 0; slot < 8; ++slot) {
        store_be<std::uint32_t>(slow, 208 + slot * 48, 0x00ac71f3);
        store_be<std::uint32_t>(slow, 212 + slot * 48, 200'000'000);
    }
    try {
        unlock_luks(slow, Secret("x"), "disk.qcow2");
        FAIL("accepted");
    } catch (const Error &error) {
        CHECK(std::string(error.what()).find("rounds of key derivation") != std::string::npos);
    }
    Bytes noise(2 << 20);
    std::mt19937_64 random(1);
    for (auto &b : noise)
        b = std::byte(random());
    CHECK_THROWS_AS(unlock_luks(noise, Secret("x"), "disk.qcow2"), Error);
}

TEST_CASE("An image that is not encrypted as it says is refused") {
    const auto disk = std::make_shared<FaultyDisk>(Bytes(1 << 20));
    FaultyFile file(disk);
    const Secret secret("x");
    const auto refusal = [&](const Header &header, const Secret *passphrase = nullptr) -> std::string {
        try {
            if (!unlock_image(file, header, passphrase))
                return "not encrypted";
        } catch (const Error &error) {
            return error.what();
        }
        return "";
    };
    const auto says = [](const std::string &text, const char *part) { return text.find(part) != std::string::npos; };
    Header header;
    CHECK(refusal(header) == "not encrypted");
    header.crypt_method = Header::crypt_aes;
    CHECK(says(refusal(header), "legacy AES"));
    header.crypt_method = Header::crypt_luks;
    Bytes pointer(16);
    store_be<std::uint64_t>(pointer, 0, 1 << 16);
    store_be<std::uint64_t>(pointer, 8, 1 << 20);
    header.extensions.push_back({Header::extension_encryption, pointer});
    CHECK(says(refusal(header), "beyond the end"));
    store_be<std::uint64_t>(pointer, 8, 1 << 18);
    header.extensions[0].data = pointer;
    CHECK(says(refusal(header), "give its passphrase"));
    CHECK(says(refusal(header, &secret), "should hold a LUKS header"));
}

TEST_CASE("An image whose data is encrypted is a byte array all the same") {
    // What a LUKS image is once it is unlocked: fresh clusters are noise, nothing can be punched.
    const std::uint64_t seed = fresh_seed();
    INFO("QLEAN_SEED=" << seed);
    std::mt19937_64 random(seed);
    constexpr std::uint64_t size = 300 * 1024 + 512;
    const auto below = std::make_shared<FaultyDisk>(Bytes(size));
    Bytes bytes = empty_image(size, 4096);
    store_be<std::uint64_t>(bytes, 72, Header::incompatible_data_file);
    const auto disk = std::make_shared<FaultyDisk>(bytes);
    Image::Options options;
    options.open_data = [&](const Header &) {
        return std::make_unique<EncryptedFile>(std::make_unique<FaultyFile>(below), cipher());
    };
    const auto image = Image::open(std::make_unique<FaultyFile>(disk), options);
    Bytes model(size);
    for (int i = 0; i < 500; ++i) {
        const std::uint64_t at = random() % size, n = std::min<std::uint64_t>(1 + random() % 9000, size - at);
        const auto from = model.begin() + static_cast<std::ptrdiff_t>(at);
        if (random() % 3 == 0) {
            image->zero({at}, n, random() % 2 ? Image::Zero::may_trim : Image::Zero::keep_space, false);
            std::fill_n(from, n, std::byte{0});
        } else {
            const Bytes data = bytes_of(n, static_cast<unsigned>(random() % 256));
            image->write(data, {at});
            std::copy(data.begin(), data.end(), from);
        }
    }
    CHECK(read_all(*image) == model);
}
