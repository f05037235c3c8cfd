// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "sector_cipher.h"

#include "error.h"
#include "thread_safety.h"

#include <array>
#include <openssl/evp.h>
#include <optional>
#include <vector>

namespace qlean {

namespace {

enum class Iv { plain, plain64, essiv };
enum Direction : int { decrypting = 0, encrypting = 1 };
constexpr std::size_t block = 16;

using Iv16 = std::array<unsigned char, block>;

struct FreeContext {
    void operator()(EVP_CIPHER_CTX *context) const { EVP_CIPHER_CTX_free(context); } // wipes the key it holds
};
using Context = std::unique_ptr<EVP_CIPHER_CTX, FreeContext>;

unsigned char *raw(std::byte *bytes) { return reinterpret_cast<unsigned char *>(bytes); }
const unsigned char *raw(const std::byte *bytes) { return reinterpret_cast<const unsigned char *>(bytes); }

[[noreturn]] void throw_failed(const char *what) {
    throw Error(Error::Kind::io, EIO, fmt::format("{} with libcrypto failed", what));
}

Context make_context(const EVP_CIPHER *cipher, const Secret &key, Direction direction) {
    Context context(EVP_CIPHER_CTX_new());
    if (!context || EVP_CipherInit_ex(context.get(), cipher, nullptr, raw(key.bytes().data()), nullptr, direction) != 1)
        throw_failed("preparing a key");
    EVP_CIPHER_CTX_set_padding(context.get(), 0);
    return context;
}

/// Contexts of one key and direction: one thread uses one at a time.
class Pool {
  public:
    Pool(const EVP_CIPHER *cipher, Secret key, Direction direction)
        : cipher_(cipher), key_(std::move(key)), direction_(direction) {
        free_.push_back(make_context(cipher_, key_, direction_)); // a key that cannot be used is found here
    }

    template <class F>
    void with(F &&f) {
        Context context;
        {
            const Lock guard(mutex_);
            if (!free_.empty()) {
                context = std::move(free_.back());
                free_.pop_back();
            }
        }
        if (!context)
            context = make_context(cipher_, key_, direction_);
        f(context.get());
        const Lock guard(mutex_);
        free_.push_back(std::move(context));
    }

  private:
    const EVP_CIPHER *cipher_;
    const Secret key_;
    const Direction direction_;
    Mutex mutex_;
    std::vector<Context> free_ PROTECTED_BY(mutex_);
};

Secret copy_of(const Secret &secret) {
    Secret copy(secret.size());
    std::memcpy(copy.bytes().data(), secret.bytes().data(), secret.size());
    return copy;
}

/// "xts-plain64" in its parts.
struct Mode {
    explicit Mode(const std::string &text) {
        const std::size_t dash = text.find('-');
        chaining = text.substr(0, dash);
        const std::string name = dash == std::string::npos ? "" : text.substr(dash + 1);
        if (name == "plain64")
            iv = Iv::plain64;
        else if (name == "plain")
            iv = Iv::plain;
        else if (name == "essiv:sha256")
            iv = Iv::essiv;
    }

    std::string chaining;
    std::optional<Iv> iv;
};

const EVP_CIPHER *find_cipher(const std::string &name, const std::string &chaining, std::size_t key_bytes) {
    if (name != "aes")
        return nullptr;
    if (chaining == "xts")
        return key_bytes == 64 ? EVP_aes_256_xts() : key_bytes == 32 ? EVP_aes_128_xts() : nullptr;
    if (chaining == "cbc")
        return key_bytes == 32   ? EVP_aes_256_cbc()
               : key_bytes == 24 ? EVP_aes_192_cbc()
               : key_bytes == 16 ? EVP_aes_128_cbc()
                                 : nullptr;
    return nullptr;
}

} // namespace

struct SectorCipher::Parts {
    Iv iv;
    std::unique_ptr<Pool> encrypt, decrypt;
    std::unique_ptr<Pool> essiv; ///< turns a sector number into its vector

    Iv16 vector_of(std::uint64_t number) const {
        Iv16 vector{};
        if (iv == Iv::plain)
            number &= 0xffffffff;
        for (std::size_t i = 0; i < 8; ++i)
            vector[i] = static_cast<unsigned char>(number >> (8 * i));
        if (iv == Iv::essiv)
            essiv->with([&](EVP_CIPHER_CTX *context) {
                int n = 0;
                if (EVP_CipherUpdate(context, vector.data(), &n, vector.data(), block) != 1 || n != block)
                    throw_failed("encrypting a sector number");
            });
        return vector;
    }

    void crypt(Pool &pool, std::span<const std::byte> from, std::span<std::byte> into, std::uint64_t first,
               const char *what) const {
        pool.with([&](EVP_CIPHER_CTX *context) {
            for (std::size_t at = 0; at < from.size(); at += sector, ++first) {
                const Iv16 vector = vector_of(first);
                int n = 0;
                if (EVP_CipherInit_ex(context, nullptr, nullptr, nullptr, vector.data(), -1) != 1 ||
                    EVP_CipherUpdate(context, raw(into.data() + at), &n, raw(from.data() + at), sector) != 1 ||
                    n != sector)
                    throw_failed(what);
            }
        });
    }
};

SectorCipher::SectorCipher(const std::string &name, const std::string &mode, Secret key, const std::string &file)
    : parts_(std::make_unique<Parts>()) {
    require_known(name, mode, key.size(), file);
    const Mode parsed(mode);
    parts_->iv = *parsed.iv;
    if (parts_->iv == Iv::essiv) {
        Secret hash(32);
        unsigned n = 0;
        if (EVP_Digest(key.bytes().data(), key.size(), raw(hash.bytes().data()), &n, EVP_sha256(), nullptr) != 1)
            throw_failed("hashing a key");
        parts_->essiv = std::make_unique<Pool>(EVP_aes_256_ecb(), std::move(hash), encrypting);
    }
    const EVP_CIPHER *cipher = find_cipher(name, parsed.chaining, key.size());
    parts_->encrypt = std::make_unique<Pool>(cipher, copy_of(key), encrypting);
    parts_->decrypt = std::make_unique<Pool>(cipher, std::move(key), decrypting);
}

void SectorCipher::require_known(const std::string &name, const std::string &mode, std::size_t key_bytes,
                                 const std::string &file) {
    const Mode parsed(mode);
    if (find_cipher(name, parsed.chaining, key_bytes) == nullptr || !parsed.iv)
        throw Error(Error::Kind::unsupported, ENOTSUP,
                    fmt::format("'{}' is encrypted with {}-{} and a key of {} bits, which is not supported; AES in XTS "
                                "or CBC mode is",
                                file, name, mode, key_bytes * 8));
}

SectorCipher::~SectorCipher() = default;
SectorCipher::SectorCipher(SectorCipher &&) noexcept = default;

void SectorCipher::encrypt(std::span<const std::byte> from, std::span<std::byte> into, std::uint64_t first) const {
    parts_->crypt(*parts_->encrypt, from, into, first, "encrypting");
}

void SectorCipher::decrypt(std::span<const std::byte> from, std::span<std::byte> into, std::uint64_t first) const {
    parts_->crypt(*parts_->decrypt, from, into, first, "decrypting");
}

} // namespace qlean
