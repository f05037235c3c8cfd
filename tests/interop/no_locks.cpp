// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// For LD_PRELOAD: a host whose file systems know no open file description locks. They fail with the number in NO_LOCKS.
#include <cerrno>
#include <cstdarg>
#include <cstdlib>
#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

int answer(int fd, int command, std::va_list rest) {
    void *argument = va_arg(rest, void *);
    if (command == F_OFD_SETLK || command == F_OFD_SETLKW || command == F_OFD_GETLK) {
        const char *number = std::getenv("NO_LOCKS");
        errno = number != nullptr ? std::atoi(number) : ENOLCK;
        return -1;
    }
    return static_cast<int>(::syscall(SYS_fcntl, fd, command, argument));
}

} // namespace

// With offsets of 64 bits this is called fcntl64, here and where the engine calls it.
extern "C" __attribute__((visibility("default"))) int fcntl(int fd, int command, ...) {
    std::va_list rest;
    va_start(rest, command);
    const int result = answer(fd, command, rest);
    va_end(rest);
    return result;
}
