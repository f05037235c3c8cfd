// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// A byte at 100 + p, read-locked, says "I use permission p"; one at 200 + p says "nobody else may use p". Only read
// locks are taken: a conflict is found by asking whether a write lock could be had, so that lockers never block each
// other and `-U` readers are never in the way. p: 0 consistent read, 1 write, 3 resize.
#include "image_lock.h"

#include "error.h"

#include <fcntl.h>
#include <initializer_list>
#include <unistd.h>

namespace qlean {

namespace {

struct flock byte_lock(short type, off_t at) {
    struct flock lock {};
    lock.l_type = type;
    lock.l_whence = SEEK_SET;
    lock.l_start = at;
    lock.l_len = 1;
    return lock;
}

[[noreturn]] void throw_busy(const PosixFile &file) {
    throw Error(
        Error::Kind::busy, EBUSY,
        fmt::format("'{}' is in use by another process (QEMU, qemu-img or another server); close it there first",
                    file.name()));
}

/// NFS 3 without its lock service, or a FUSE file system that has none. Served all the same, two writers would meet.
[[noreturn]] void throw_without_locks(int code, const PosixFile &file) {
    throw_io(code,
             fmt::format("cannot lock '{}', so others could change it meanwhile; its file system must support open "
                         "file description locks (NFS 3 needs rpc.statd running on the server and here)",
                         file.name()));
}

void share(const PosixFile &file, off_t at) {
    auto lock = byte_lock(F_RDLCK, at);
    if (::fcntl(file.descriptor(), F_OFD_SETLK, &lock) == 0)
        return;
    if (errno == EAGAIN || errno == EACCES)
        throw_busy(file);
    throw_without_locks(errno, file);
}

void require_free(const PosixFile &file, off_t at) {
    auto lock = byte_lock(F_WRLCK, at);
    if (::fcntl(file.descriptor(), F_OFD_GETLK, &lock) == -1)
        throw_without_locks(errno, file);
    if (lock.l_type != F_UNLCK)
        throw_busy(file);
}

void lock(const PosixFile &file, std::initializer_list<off_t> shared, std::initializer_list<off_t> free) {
    for (const off_t at : shared)
        share(file, at);
    for (const off_t at : free)
        require_free(file, at);
}

} // namespace

// On a throw the descriptor, and with it every lock taken here, is closed by the caller.

void lock_image(const PosixFile &file, PosixFile::Access access) {
    if (access == PosixFile::Access::read_write)
        lock(file, {100, 101, 103, 201, 203}, {200, 201, 203, 101, 103});
    else
        lock(file, {100, 201, 203}, {200, 101, 103});
}

void lock_data_file(const PosixFile &file, PosixFile::Access access) {
    if (access == PosixFile::Access::read_write)
        lock(file, {100, 101, 103, 203}, {200, 201, 203, 103});
    else
        lock(file, {100, 203}, {200, 103});
}

} // namespace qlean
