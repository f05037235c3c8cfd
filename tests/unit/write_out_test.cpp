// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// A write that failed in the background is told once for each open file. Whoever waits by sync_file_range() is told,
// and the fdatasync() of the guest's flush then succeeds over lost data: so nobody may wait that way.
#include "../catch.h"
#include "lib/posix_file.h"

#include <cstdio>
#include <fcntl.h>
#include <string>
#include <unistd.h>

namespace {

unsigned asked = 0, waited = 0;

} // namespace

/// In front of the C library's.
extern "C" int sync_file_range(int, off64_t, off64_t, unsigned flags) {
    ++asked;
    waited += (flags & (SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WAIT_AFTER)) != 0;
    return 0;
}

TEST_CASE("Writing out ahead never takes the error that belongs to the next sync") {
    std::string path = "/tmp/qlean-write-out.XXXXXX";
    const int fd = ::mkstemp(path.data());
    REQUIRE(fd != -1);
    REQUIRE(::ftruncate(fd, 65536) == 0);
    ::close(fd);
    {
        const auto file = qlean::PosixFile::open(path, qlean::PosixFile::Access::read_write);
        asked = waited = 0;
        file->prepare_to_share({0}, 65536);
        file->start_writing_out({0}, 65536);
        CHECK(asked >= 1);
        CHECK(waited == 0);
    }
    std::remove(path.c_str());
}
