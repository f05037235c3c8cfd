// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The watcher over a disk that writes down every call: what goes down, with which flags, when a cluster is given back
// and by which means, and what a failure leaves recorded.

#include <cerrno>
#include <cstring>
#include <string>
#include <vector>

#include <fmt/format.h>

#include "filter/watcher.h"
#include "tests/catch.h"

using namespace qlean;

namespace {

constexpr std::uint64_t K = 1024, M = 1024 * K;
using Calls = std::vector<std::string>;

/// A disk below the filter. The callbacks find it again because it is what they are called with.
struct FakeDisk : nbdkit_next_ops {
    Calls calls;
    int fail_at = -1; ///< number of the call that fails

    FakeDisk() : nbdkit_next_ops{} {
        pwrite = [](nbdkit_next *n, const void *, std::uint32_t count, std::uint64_t offset, std::uint32_t flags,
                    int *err) { return call(n, "write", count, offset, flags, err); };
        trim = [](nbdkit_next *n, std::uint32_t count, std::uint64_t offset, std::uint32_t flags, int *err) {
            return call(n, "trim", count, offset, flags, err);
        };
        zero = [](nbdkit_next *n, std::uint32_t count, std::uint64_t offset, std::uint32_t flags, int *err) {
            return call(n, "zero", count, offset, flags, err);
        };
        flush = [](nbdkit_next *n, std::uint32_t flags, int *err) { return call(n, "flush", 0, 0, flags, err); };
    }

    static int call(nbdkit_next *n, const char *what, std::uint32_t count, std::uint64_t offset, std::uint32_t flags,
                    int *err) {
        auto *self = static_cast<FakeDisk *>(n);
        self->calls.push_back(
            fmt::format("{} {}K+{}K{}{}{}", what, offset / K, count / K, flags & NBDKIT_FLAG_FUA ? " fua" : "",
                        flags & NBDKIT_FLAG_MAY_TRIM ? " may_trim" : "", flags & NBDKIT_FLAG_FAST_ZERO ? " fast" : ""));
        if (self->fail_at != static_cast<int>(self->calls.size()) - 1)
            return 0;
        *err = ENOSPC;
        return -1;
    }

    Calls take() { return std::exchange(calls, {}); }
};

struct Fixture {
    FakeDisk fake;
    InnerDisk disk{&fake, true, true, true};
    Watcher watcher{256 * M + 6 * K, 64 * K, 64 << 20};
    int err = 0;

    int trim(std::uint64_t at, std::uint64_t length, std::uint32_t flags = 0) {
        return watcher.trim(disk, static_cast<std::uint32_t>(length), at, flags, &err);
    }
    int zero(std::uint64_t at, std::uint64_t length, std::uint32_t flags = NBDKIT_FLAG_MAY_TRIM) {
        return watcher.zero(disk, static_cast<std::uint32_t>(length), at, flags, &err);
    }
    int write(std::uint64_t at, std::uint64_t length, char fill) {
        const std::string payload(length, fill);
        return watcher.write(disk, payload.data(), static_cast<std::uint32_t>(length), at, 0, &err);
    }
    int reclaim(std::uint64_t at, std::uint64_t length) {
        return watcher.reclaim(
            disk, {at, at + length}, [] { return false; }, &err);
    }
    std::string plan(std::uint64_t at, std::uint64_t length) {
        std::string text;
        std::uint64_t next = at;
        watcher.plan(disk, {at, at + length}, [&](ByteRange part, bool to_do) {
            CHECK(part.begin == next);
            CHECK(part.end > part.begin);
            next = part.end;
            text += fmt::format("{}{}K ", to_do ? '+' : '-', part.length() / K);
            return true;
        });
        CHECK(next == at + length);
        return text;
    }
};

} // namespace

TEST_CASE_METHOD(Fixture, "The discard that completes a cluster frees it in the same request") {
    for (std::uint64_t at = 64 * K; at < 128 * K; at += 32 * K)
        CHECK(trim(at, 32 * K, NBDKIT_FLAG_FUA) == 0);
    CHECK(fake.take() == Calls{"trim 64K+32K fua", "trim 96K+32K fua", "trim 64K+64K"});
    CHECK(watcher.status().given_back_bytes == 64 * K);
    CHECK(watcher.status().recorded_bytes == 0);
}

TEST_CASE_METHOD(Fixture, "Where the guest wrote zeroes, the cluster is given back as zeroes") {
    CHECK(write(0, 32 * K, 0) == 0);
    CHECK(trim(32 * K, 32 * K) == 0);
    CHECK(fake.take() == Calls{"write 0K+32K", "trim 32K+32K", "zero 0K+64K may_trim"});
    SECTION("also if zeroes filled less than a granule") {
        CHECK(trim(64 * K, 60 * K) == 0);
        CHECK(zero(70 * K, 1 * K) == 0);
        CHECK(trim(124 * K, 4 * K) == 0);
        CHECK(fake.take().back() == "zero 64K+64K may_trim");
    }
}

TEST_CASE_METHOD(Fixture, "Zeroes the guest wanted no hole for wait for the export") {
    CHECK(write(0, 64 * K, 0) == 0);
    CHECK(zero(64 * K, 64 * K, 0) == 0);
    CHECK(fake.take() == Calls{"write 0K+64K", "zero 64K+64K"});
    CHECK(plan(0, 1 * M) == "+128K -896K ");
    CHECK(watcher.status().ready_bytes == 128 * K);
    CHECK(reclaim(0, 1 * M) == 0);
    CHECK(fake.take() == Calls{"zero 0K+128K may_trim"});
    CHECK(plan(0, 1 * M) == "-1024K ");
    CHECK(watcher.status().given_back_bytes == 128 * K);
}

TEST_CASE_METHOD(Fixture, "A write of data takes a cluster out of the plan, before it goes down") {
    CHECK(write(0, 64 * K, 0) == 0);
    fake.fail_at = 1; // even a write that fails: nobody knows what it left behind
    CHECK(write(4 * K, 1, 'x') == -1);
    CHECK(err == ENOSPC);
    CHECK(plan(0, 1 * M) == "-1024K ");
    fake.take();
    CHECK(reclaim(0, 1 * M) == 0);
    CHECK(fake.take().empty());
}

TEST_CASE_METHOD(Fixture, "What failed isn't recorded, and what was recorded there is forgotten") {
    CHECK(write(0, 60 * K, 0) == 0);
    fake.fail_at = 1;
    SECTION("discard") { CHECK(trim(0, 8 * K) == -1); }
    SECTION("zeroing") { CHECK(zero(0, 8 * K) == -1); }
    SECTION("zero payload") { CHECK(write(0, 8 * K, 0) == -1); }
    CHECK(watcher.status().recorded_bytes == 52 * K);
}

TEST_CASE_METHOD(Fixture, "A failure to give back is not the guest's") {
    CHECK(trim(0, 32 * K) == 0);
    fake.fail_at = 2;
    CHECK(trim(32 * K, 32 * K) == 0);
    CHECK(fake.take().size() == 3);
    CHECK(watcher.status().recorded_bytes == 0);
    CHECK(watcher.status().given_back_bytes == 0);
}

TEST_CASE_METHOD(Fixture, "Clusters wholly discarded in one request leave nothing to remember") {
    CHECK(trim(32 * K, 256 * K) == 0);
    CHECK(fake.take() == Calls{"trim 32K+256K"});
    CHECK(watcher.status().recorded_bytes == 64 * K);
    CHECK(plan(0, 1 * M) == "-1024K ");
    SECTION("the two cut ones are completed later") {
        CHECK(trim(0, 32 * K) == 0);
        CHECK(trim(288 * K, 32 * K) == 0);
        CHECK(watcher.status().recorded_bytes == 0);
        CHECK(watcher.status().given_back_bytes == 128 * K);
    }
}

TEST_CASE_METHOD(Fixture, "The last, short cluster is freed whole") {
    CHECK(trim(256 * M, 4 * K) == 0);
    CHECK(trim(256 * M + 4 * K, 2 * K) == 0);
    CHECK(fake.take().back() == "trim 262144K+6K");
    CHECK(watcher.status().given_back_bytes == 6 * K);
}

TEST_CASE_METHOD(Fixture, "A long discard goes down in pieces, with one flush for its FUA") {
    CHECK(trim(16 * M, 80 * M, NBDKIT_FLAG_FUA) == 0);
    CHECK(fake.take() == Calls{"trim 16384K+16384K", "trim 32768K+32768K", "trim 65536K+32768K", "flush 0K+0K"});
    SECTION("or with FUA on each where there is no flush") {
        disk.flushes = false;
        CHECK(trim(16 * M, 20 * M, NBDKIT_FLAG_FUA) == 0);
        CHECK(fake.take() == Calls{"trim 16384K+16384K fua", "trim 32768K+4096K fua"});
    }
    SECTION("and stops at the first that fails") {
        fake.fail_at = 1;
        CHECK(trim(16 * M, 80 * M) == -1);
        CHECK(fake.take().size() == 2);
    }
}

TEST_CASE_METHOD(Fixture, "A disk that can only discard never has zeroes recorded") {
    disk.zeroes = false;
    CHECK(trim(0, 60 * K) == 0);
    CHECK(write(0, 4 * K, 0) == 0);
    CHECK(watcher.status().recorded_bytes == 56 * K);
    CHECK(trim(0, 4 * K) == 0);
    CHECK(trim(60 * K, 4 * K) == 0);
    CHECK(fake.take().back() == "trim 0K+64K");
}

TEST_CASE_METHOD(Fixture, "Reclaim stops where its client goes away, and says so") {
    CHECK(write(0, 8 * M, 0) == 0);
    fake.take();
    int asked = 0;
    CHECK(watcher.reclaim(
              disk, {0, 8 * M}, [&] { return ++asked == 3; }, &err) == -1);
    CHECK(err == ESHUTDOWN);
    CHECK(fake.take() == Calls{"zero 0K+2048K may_trim", "zero 2048K+2048K may_trim"});
    CHECK(plan(0, 8 * M) == "-4096K +4096K ");
}

TEST_CASE_METHOD(Fixture, "The plan is clipped to the request and joins neighbours") {
    CHECK(write(0, 64 * K, 0) == 0); // to be given back as zeroes
    CHECK(write(64 * K, 64 * K, 0) == 0);
    CHECK(write(256 * K, 64 * K, 0) == 0);
    CHECK(plan(10 * K, 300 * K) == "+118K -128K +54K ");
    CHECK(plan(130 * K, 20 * K) == "-20K ");
    SECTION("a caller that has enough gets no more") {
        int extents = 0;
        watcher.plan(disk, {0, 1 * M}, [&](ByteRange, bool) { return ++extents < 1; });
        CHECK(extents == 1);
    }
}

TEST_CASE_METHOD(Fixture, "A change through another name only makes the record forget") {
    CHECK(write(0, 64 * K, 0) == 0);
    CHECK(watcher.unwatched_change({0, 10}, [] { return 0; }) == 0);
    CHECK(watcher.status().recorded_bytes == 60 * K);
    CHECK(watcher.unwatched_change({300 * M, 301 * M}, [] { return -1; }) == -1); // beyond this disk's end
}
