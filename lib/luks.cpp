// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "luks.h"

#include "byte_order.h"
#include "error.h"

#include <libcryptsetup.h>
#include <sys/mman.h>
#include <unistd.h>

namespace qlean {

namespace {

/// A file in memory that lives as long as this object. libcryptsetup wants a path.
class MemoryFile {
  public:
    MemoryFile(std::span<const std::byte> bytes) : fd_(::memfd_create("qlean-luks", MFD_CLOEXEC)) {
        if (fd_ == -1)
            throw_io(errno, "cannot create a file in memory for a LUKS header");
        for (std::size_t done = 0; done < bytes.size();) {
            const ssize_t n = ::write(fd_, bytes.data() + done, bytes.size() - done);
            if (n <= 0) {
                const int code = errno;
                ::close(fd_);
                throw_io(code, "cannot fill a file in memory with a LUKS header");
            }
            done += static_cast<std::size_t>(n);
        }
    }
    ~MemoryFile() { ::close(fd_); }
    MemoryFile(const MemoryFile &) = delete;
    MemoryFile &operator=(const MemoryFile &) = delete;
    std::string path() const { return fmt::format("/proc/self/fd/{}", fd_); }

  private:
    int fd_;
};

/// Rounds of key derivation that a header may ask for, its slots together: minutes of work. QEMU and cryptsetup choose
/// a hundredth of that; a header that asks for more wants us to be busy for days.
constexpr std::uint64_t max_rounds = std::uint64_t{1} << 30;
constexpr std::size_t header_bytes = 592, digest_rounds_at = 164, slots_at = 208, slot_bytes = 48, slots = 8;
constexpr std::uint32_t slot_enabled = 0x00ac71f3;

void require_bounded(std::span<const std::byte> header, const std::string &file) {
    if (header.size() < header_bytes)
        throw_bad_image("'{}' is damaged: its LUKS header of {} bytes is too short", file, header.size());
    std::uint64_t rounds = load_be<std::uint32_t>(header, digest_rounds_at);
    for (std::size_t at = slots_at; at < slots_at + slots * slot_bytes; at += slot_bytes)
        if (load_be<std::uint32_t>(header, at) == slot_enabled)
            rounds += load_be<std::uint32_t>(header, at + 4);
    if (rounds > max_rounds)
        throw_bad_image("'{}' is damaged: opening its LUKS header would take {} rounds of key derivation", file,
                        rounds);
}

struct FreeDevice {
    void operator()(crypt_device *device) const { crypt_free(device); }
};

} // namespace

LuksPointer LuksPointer::parse(std::span<const std::byte> extension, const Geometry &geometry,
                               const std::string &file) {
    if (extension.size() < 16)
        throw_bad_image("'{}' is damaged: its encryption header extension has {} bytes instead of 16", file,
                        extension.size());
    const LuksPointer pointer{{load_be<std::uint64_t>(extension, 0)}, load_be<std::uint64_t>(extension, 8)};
    if (pointer.at.value == 0 || pointer.at.value % geometry.cluster_size() != 0 ||
        pointer.at.value > std::uint64_t{1} << 56 || pointer.length == 0 || pointer.length > max_length)
        throw_bad_image("'{}' is damaged: no LUKS header of {} bytes can be at {:#x}", file, pointer.length,
                        pointer.at.value);
    return pointer;
}

SectorCipher unlock_luks(std::span<const std::byte> header, const Secret &passphrase, const std::string &file) {
    require_bounded(header, file);
    const MemoryFile memory(header);
    // Its messages would be lines in the server's log that name a file descriptor; what matters is said below.
    crypt_set_log_callback(
        nullptr, [](int, const char *, void *) {}, nullptr);
    crypt_device *opened = nullptr;
    if (const int result = crypt_init(&opened, memory.path().c_str()); result < 0)
        throw_io(-result, fmt::format("cannot look at the LUKS header of '{}'", file));
    const std::unique_ptr<crypt_device, FreeDevice> device(opened);
    if (crypt_load(opened, CRYPT_LUKS1, nullptr) < 0)
        throw_bad_image("'{}' is damaged: it should hold a LUKS header of version 1, and does not", file);
    const int key_bytes = crypt_get_volume_key_size(opened);
    if (key_bytes <= 0 || key_bytes > 512)
        throw_bad_image("'{}' is damaged: its LUKS header names a key of {} bytes", file, key_bytes);
    SectorCipher::require_known(crypt_get_cipher(opened), crypt_get_cipher_mode(opened),
                                static_cast<std::size_t>(key_bytes), file);
    Secret key(static_cast<std::size_t>(key_bytes));
    std::size_t size = key.size();
    const int slot = crypt_volume_key_get(opened, CRYPT_ANY_SLOT, reinterpret_cast<char *>(key.bytes().data()), &size,
                                          reinterpret_cast<const char *>(passphrase.bytes().data()), passphrase.size());
    if (slot == -EPERM || slot == -ENOENT)
        throw Error(Error::Kind::denied, EACCES,
                    fmt::format("the passphrase does not open '{}'; give the one it was encrypted with", file));
    if (slot < 0 || size != key.size())
        throw_bad_image("'{}': the key slots of its LUKS header cannot be read: {}", file,
                        std::generic_category().message(-slot));
    return {crypt_get_cipher(opened), crypt_get_cipher_mode(opened), std::move(key), file};
}

std::optional<LuksUnlocked> unlock_image(File &file, const Header &header, const Secret *passphrase) {
    const std::string &name = file.name();
    const HeaderExtension *extension = header.extension(Header::extension_encryption);
    if (header.crypt_method == Header::crypt_none)
        return std::nullopt;
    if (header.crypt_method == Header::crypt_aes)
        throw Error(
            Error::Kind::unsupported, ENOTSUP,
            fmt::format("'{}' uses QEMU's legacy AES encryption, which is not supported; convert it to LUKS with "
                        "'qemu-img convert'",
                        name));
    const Geometry geometry = header.geometry();
    const LuksPointer pointer = LuksPointer::parse(extension->data, geometry, name);
    const std::uint64_t length = file.length();
    if (pointer.at.value > length || pointer.length > length - pointer.at.value)
        throw_bad_image("'{}' is truncated: its encryption header at {:#x} lies beyond the end of the file ({} bytes)",
                        name, pointer.at.value, length);
    if (passphrase == nullptr)
        throw Error(
            Error::Kind::denied, EACCES,
            fmt::format("'{}' is encrypted: give its passphrase with passphrase=+FILE, or passphrase=- to be asked "
                        "(qlean: --passphrase-file FILE)",
                        name));
    std::vector<std::byte> bytes(pointer.length);
    file.read(bytes, pointer.at);
    return LuksUnlocked{pointer.run(geometry), unlock_luks(bytes, *passphrase, name)};
}

} // namespace qlean
