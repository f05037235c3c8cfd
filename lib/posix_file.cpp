// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "posix_file.h"

#include "error.h"

#include <cstring>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/uio.h>
#include <sys/xattr.h>
#include <unistd.h>

namespace qlean {

namespace {

constexpr const char *failed_sync_attribute = "user.qlean.failed-sync";

off_t as_off(HostOffset at) { return static_cast<off_t>(at.value); }

} // namespace

void File::write_zeroes(HostOffset at, std::uint64_t length) {
    static const std::vector<std::byte> zeroes(256 * 1024);
    while (length > 0) {
        const auto n = std::min<std::uint64_t>(length, zeroes.size());
        write(std::span(zeroes).first(n), at);
        at += n;
        length -= n;
    }
}

void File::punch_if_possible(HostOffset at, std::uint64_t length) {
    try {
        punch(at, length);
    } catch (const Error &) {
        // Nobody relies on it.
    }
}

std::unique_ptr<PosixFile> PosixFile::open(const std::string &path, Access access, Devices devices) {
    // What an image names may be anything: opening a pipe must not wait for somebody to write into it.
    const int flags = (access == Access::read_write ? O_RDWR : O_RDONLY) | O_CLOEXEC |
                      (devices == Devices::accepted ? O_NONBLOCK : 0);
    const int fd = ::open(path.c_str(), flags);
    if (fd == -1)
        throw_io(errno, fmt::format("cannot open image '{}' for {}", path,
                                    access == Access::read_write ? "reading and writing" : "reading"));
    std::unique_ptr<PosixFile> file(new PosixFile(fd, path));
    struct stat st;
    if (::fstat(fd, &st) == -1)
        throw_io(errno, fmt::format("cannot stat image '{}'", path));
    file->identity_ = {st.st_dev, st.st_ino};
    // btrfs shares blocks, but each sync after that logs all of the file: it takes longer than copying (measured).
    struct statfs fs;
    file->can_share_ = ::fstatfs(fd, &fs) == 0 && fs.f_type != BTRFS_SUPER_MAGIC;
    file->is_device_ = S_ISBLK(st.st_mode) && devices == Devices::accepted && access == Access::read_only;
    if (!S_ISREG(st.st_mode) && !file->is_device_)
        throw Error(Error::Kind::unsupported, EINVAL,
                    fmt::format("'{}' is not a regular file; only images in regular files can be served", path));
    return file;
}

std::unique_ptr<PosixFile> PosixFile::create(const std::string &path) {
    const int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC | O_CREAT | O_EXCL, 0666);
    if (fd == -1)
        throw_io(errno, fmt::format("cannot create image '{}'", path));
    return std::unique_ptr<PosixFile>(new PosixFile(fd, path));
}

PosixFile::~PosixFile() { ::close(fd_); }

void PosixFile::fail(int code, const char *what, HostOffset at, std::uint64_t length) const {
    throw_io(code, fmt::format("{} {} bytes at offset {:#x} of '{}' failed", what, length, at.value, path_));
}

void PosixFile::read(std::span<std::byte> into, HostOffset at) {
    while (!into.empty()) {
        const ssize_t n = ::pread(fd_, into.data(), into.size(), as_off(at));
        if (n == -1) {
            if (errno == EINTR)
                continue;
            fail(errno, "reading", at, into.size());
        }
        if (n == 0) {
            std::memset(into.data(), 0, into.size());
            return;
        }
        into = into.subspan(static_cast<std::size_t>(n));
        at += static_cast<std::uint64_t>(n);
    }
}

bool PosixFile::read_cached(std::span<std::byte> into, HostOffset at) {
    iovec io{into.data(), into.size()};
    const ssize_t n = ::preadv2(fd_, &io, 1, as_off(at), RWF_NOWAIT);
    return n == static_cast<ssize_t>(into.size());
}

void PosixFile::write(std::span<const std::byte> from, HostOffset at) {
    while (!from.empty()) {
        const ssize_t n = ::pwrite(fd_, from.data(), from.size(), as_off(at));
        if (n == -1) {
            if (errno == EINTR)
                continue;
            fail(errno, "writing", at, from.size());
        }
        from = from.subspan(static_cast<std::size_t>(n));
        at += static_cast<std::uint64_t>(n);
    }
}

/// Whoever opens the file next must know.
void PosixFile::fail_to_sync(int code, const char *how) {
    remember_failed_sync(true);
    throw_io(code, fmt::format("making '{}' durable ({}) failed", path_, how));
}

void PosixFile::sync() {
    if (::fdatasync(fd_) == -1)
        fail_to_sync(errno, "fdatasync");
}

void PosixFile::truncate(std::uint64_t length) {
    int result;
    while ((result = ::ftruncate(fd_, static_cast<off_t>(length))) == -1 && errno == EINTR) {
    }
    if (result == -1)
        throw_io(errno, fmt::format("setting the length of '{}' to {} failed", path_, length));
}

bool PosixFile::punch(HostOffset at, std::uint64_t length) {
    if (!can_punch_.load(std::memory_order_relaxed))
        return false;
    while (::fallocate(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, as_off(at), static_cast<off_t>(length)) == -1) {
        if (errno == EINTR)
            continue;
        if (errno == EOPNOTSUPP || errno == ENOSYS) {
            can_punch_.store(false, std::memory_order_relaxed);
            return false;
        }
        fail(errno, "punching", at, length);
    }
    return true;
}

bool PosixFile::zero_keeping_space(HostOffset at, std::uint64_t length) {
    if (!can_zero_.load(std::memory_order_relaxed))
        return false;
    while (::fallocate(fd_, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, as_off(at), static_cast<off_t>(length)) == -1) {
        if (errno == EINTR)
            continue;
        if (errno == EOPNOTSUPP || errno == ENOSYS) {
            can_zero_.store(false, std::memory_order_relaxed);
            return false;
        }
        fail(errno, "zeroing", at, length);
    }
    return true;
}

void PosixFile::reserve_space(HostOffset at, std::uint64_t length) {
    while (::fallocate(fd_, FALLOC_FL_KEEP_SIZE, as_off(at), static_cast<off_t>(length)) == -1) {
        if (errno == EINTR)
            continue;
        if (errno == EOPNOTSUPP || errno == ENOSYS)
            return;
        fail(errno, "reserving", at, length);
    }
}

/// File systems share whole blocks of theirs, of which few are larger than this.
bool PosixFile::may_share(HostOffset at, std::uint64_t length) const {
    return can_share_.load(std::memory_order_relaxed) && at.value % host_block == 0 && length % host_block == 0;
}

bool PosixFile::share(HostOffset from, HostOffset to, std::uint64_t length) {
    if (!may_share(from, length) || !may_share(to, length))
        return false;
    file_clone_range range{};
    range.src_fd = fd_;
    range.src_offset = from.value;
    range.src_length = length;
    range.dest_offset = to.value;
    while (::ioctl(fd_, FICLONERANGE, &range) == -1) {
        if (errno == EINTR)
            continue;
        if (errno == EINVAL) // blocks larger than the cluster, or a cluster that the file ends within
            return false;
        if (errno == EOPNOTSUPP || errno == ENOTTY || errno == ENOSYS || errno == EXDEV || errno == EPERM) {
            can_share_.store(false, std::memory_order_relaxed);
            return false;
        }
        fail(errno, "sharing", to, length);
    }
    return true;
}

/// Without waiting for it: sync_file_range() that waits is told of an earlier write that failed, and then the next
/// fdatasync(), which has to fail for it, is not.
void PosixFile::prepare_to_share(HostOffset at, std::uint64_t length) {
    if (may_share(at, length))
        start_writing_out(at, length);
}

std::uint64_t PosixFile::length() {
    if (is_device_) {
        const off_t end = ::lseek(fd_, 0, SEEK_END);
        if (end == -1)
            throw_io(errno, fmt::format("cannot find out the size of '{}'", path_));
        return static_cast<std::uint64_t>(end);
    }
    struct stat st;
    if (::fstat(fd_, &st) == -1)
        throw_io(errno, fmt::format("cannot stat image '{}'", path_));
    return static_cast<std::uint64_t>(st.st_size);
}

std::uint64_t PosixFile::allocated() {
    struct stat st;
    if (::fstat(fd_, &st) == -1)
        throw_io(errno, fmt::format("cannot stat image '{}'", path_));
    return static_cast<std::uint64_t>(st.st_blocks) * 512;
}

std::optional<HostOffset> PosixFile::next_data(HostOffset at) {
    const off_t found = ::lseek(fd_, as_off(at), SEEK_DATA);
    if (found == -1) {
        if (errno == ENXIO)
            return std::nullopt;
        return at; // a file system without SEEK_DATA: everything may be data
    }
    return HostOffset{static_cast<std::uint64_t>(found)};
}

HostOffset PosixFile::next_hole(HostOffset at) {
    const off_t found = ::lseek(fd_, as_off(at), SEEK_HOLE);
    return {found == -1 ? length() : static_cast<std::uint64_t>(found)};
}

void PosixFile::will_need(HostOffset at, std::uint64_t length) {
    ::posix_fadvise(fd_, as_off(at), static_cast<off_t>(length), POSIX_FADV_WILLNEED);
}

void PosixFile::start_writing_out(HostOffset at, std::uint64_t length) {
    ::sync_file_range(fd_, as_off(at), static_cast<off_t>(length), SYNC_FILE_RANGE_WRITE);
}

/// Writes back what is dirty and forgets the page cache: after a failed sync the kernel marks pages clean that never
/// reached the device, and only the device tells the truth.
void PosixFile::distrust_page_cache() {
    if (::fsync(fd_) == -1)
        fail_to_sync(errno, "fsync");
    ::posix_fadvise(fd_, 0, 0, POSIX_FADV_DONTNEED);
}

void PosixFile::agree_with_device() {
    if (!had_failed_sync())
        return sync();
    distrust_page_cache();
    remember_failed_sync(false);
}

void PosixFile::remember_failed_sync(bool failed) {
    // Best effort: a file system without user attributes cannot remember; the poison of this process still holds.
    if (failed)
        ::fsetxattr(fd_, failed_sync_attribute, "1", 1, 0);
    else
        ::fremovexattr(fd_, failed_sync_attribute);
}

bool PosixFile::had_failed_sync() const { return ::fgetxattr(fd_, failed_sync_attribute, nullptr, 0) >= 0; }

} // namespace qlean
