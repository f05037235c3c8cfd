// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// A process that does guest I/O and compacts is killed with SIGKILL at a random moment; then every byte that was
// flushed must be there, or a byte that was written over it later.
//
// The child logs each operation in shared memory before it begins and counts it when it has ended; a flush notes how
// many operations of each thread had ended when it began, and publishes that when it returns. The parent replays: what
// a finished flush covers gives the one value a byte must have, later operations add values it may have.
//
//   killed IMAGE SEED MILLISECONDS [threads=4]
#include "lib/compact/compact.h"
#include "lib/compact/zero_scan.h"
#include "lib/image.h"

#include <array>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <random>
#include <sys/mman.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>

using namespace qlean;

namespace {

constexpr unsigned max_threads = 8;
constexpr std::size_t max_operations = 1 << 16;

struct Operation {
    std::uint64_t at, length;
    unsigned char value; ///< byte i of a write is value ^ (i & 7); 0: all zeroes
    std::byte byte(std::uint64_t offset) const {
        return value == 0 ? std::byte{0} : std::byte(value ^ ((offset - at) & 7));
    }
};

struct Log {
    std::atomic<std::uint64_t> begun, ended, flushed;
    Operation operations[max_operations];
};

struct Shared {
    std::atomic<bool> failed;
    std::atomic<std::uint64_t> flushes, passes;
    Log logs[max_threads];
};

Shared *shared;
std::mutex publish_mutex;

void guest(Image &image, unsigned id, unsigned threads, std::uint64_t seed) {
    std::mt19937_64 random(seed * 100 + id);
    Log &log = shared->logs[id];
    const std::uint64_t cluster = image.geometry().cluster_size(), size = image.size();
    while (log.begun < max_operations) {
        // Small slots in the lower half, so that threads share clusters; whole clusters in the upper one.
        const bool large = random() & 1;
        const std::uint64_t slot = large ? 4 * cluster : std::max<std::uint64_t>(cluster / 4, 512);
        const std::uint64_t base = large ? size / 2 : 0, slots = size / 2 / slot / threads;
        if (slots == 0)
            continue;
        const std::uint64_t first = base + (random() % slots * threads + id) * slot;
        std::uint64_t at = first + random() % slot, length = 1 + random() % (first + slot - at);
        const unsigned kind = random() % 100;
        if (kind >= 95) {
            std::array<std::uint64_t, max_threads> ended{};
            for (unsigned i = 0; i < threads; ++i)
                ended[i] = shared->logs[i].ended;
            image.flush();
            const std::lock_guard guard(publish_mutex);
            for (unsigned i = 0; i < threads; ++i)
                if (shared->logs[i].flushed < ended[i])
                    shared->logs[i].flushed = ended[i];
            ++shared->flushes;
            continue;
        }
        const bool clears = kind >= 60;
        if (clears) { // trims promise zeroes only for whole clusters
            at = round_up(at, cluster);
            const std::uint64_t end = round_down(first + slot, cluster);
            if (at >= end)
                continue;
            length = end - at;
        }
        const unsigned char value = clears ? 0 : static_cast<unsigned char>(8 + random() % 240);
        const std::uint64_t n = log.begun;
        log.operations[n] = {at, length, value};
        log.begun = n + 1;
        if (!clears) {
            std::vector<std::byte> data(length);
            for (std::uint64_t i = 0; i < length; ++i)
                data[i] = log.operations[n].byte(at + i);
            image.write(data, {at});
        } else if (kind < 80) {
            image.trim({at}, length);
        } else {
            image.zero({at}, length, kind & 1 ? Image::Zero::may_trim : Image::Zero::keep_space, false);
        }
        log.ended = n + 1;
    }
}

void child(const char *path, std::uint64_t seed, unsigned threads) {
    const auto fail = [](const char *where, const std::exception &e) {
        std::fprintf(stderr, "FAILED: %s: %s\n", where, e.what());
        shared->failed = true;
        ::_exit(1);
    };
    try {
        Image::Options options;
        options.cache_bytes = 256 * 1024;
        auto image = Image::open(path, options);
        image->start_housekeeping();
        std::vector<std::thread> running;
        for (unsigned i = 0; i < threads; ++i)
            running.emplace_back([&, i] {
                try {
                    guest(*image, i, threads, seed);
                } catch (const std::exception &e) {
                    fail("guest", e);
                }
            });
        MoveOwnership ownership;
        Gauges gauges;
        try {
            std::unique_ptr<Compact> idle; // has a plan, and acts on it much later: what it found may have changed
            for (std::uint64_t connection = 1;; ++connection) {
                std::unique_ptr<Maintenance> op;
                if (connection % 5 == 1) {
                    if (idle)
                        idle->commit([] { return false; });
                    idle = std::make_unique<Compact>(*image, ownership, gauges, 1000000 + connection);
                    idle->plan({0}, image->size(), 1);
                }
                if (connection % 4 == 0)
                    op = std::make_unique<ZeroScan>(*image, gauges);
                else
                    op = std::make_unique<Compact>(*image, ownership, gauges, connection,
                                                   connection % 2 ? Compact::most_by_request
                                                                  : image->geometry().bytes(7));
                for (int round = 0; round < 2; ++round) {
                    if (connection % 2 == 0)
                        op->run({0}, image->size(), [] { return false; });
                    for (const auto &p : op->plan({0}, image->size(), 100000))
                        if (p.to_do)
                            op->run(p.at, p.length, [] { return false; });
                    op->commit([] { return false; });
                }
                ++shared->passes;
            }
        } catch (const std::exception &e) {
            fail("maintenance", e);
        }
    } catch (const std::exception &e) {
        fail("opening", e);
    }
}

/// What the byte at `offset` may be, besides `base`: any value of an operation that no finished flush covers.
bool allowed(const Log &log, std::uint64_t offset, std::byte got) {
    for (std::uint64_t n = log.flushed; n < log.begun; ++n) {
        const Operation &op = log.operations[n];
        if (offset >= op.at && offset < op.at + op.length && op.byte(offset) == got)
            return true;
    }
    return false;
}

} // namespace

int main(int argc, char **argv) try {
    if (argc < 4)
        return std::fprintf(stderr, "usage: killed IMAGE SEED MILLISECONDS [threads]\n"), 2;
    const std::uint64_t seed = std::stoull(argv[2]);
    const unsigned threads = argc > 4 ? static_cast<unsigned>(std::stoul(argv[4])) : 4;
    void *memory = ::mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || threads > max_threads)
        return std::perror("mmap"), 2;
    shared = static_cast<Shared *>(memory);

    std::vector<std::byte> base;
    {
        Image::Options options;
        options.read_only = true;
        auto image = Image::open(argv[1], options);
        base.resize(image->size());
        image->read(base, {0});
    }
    const pid_t pid = ::fork();
    if (pid == 0)
        child(argv[1], seed, threads);
    std::this_thread::sleep_for(std::chrono::milliseconds(std::stoul(argv[3])));
    ::kill(pid, SIGKILL);
    int status;
    ::waitpid(pid, &status, 0);
    if (shared->failed || !WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL)
        return std::fprintf(stderr, "FAILED: the child ended before it was killed\n"), 1;

    Image::Options options;
    auto image = Image::open(argv[1], options);
    std::vector<std::byte> got(base.size());
    image->read(got, {0});
    std::uint64_t operations = 0, durable = 0;
    std::vector<unsigned char> owner(base.size(), max_threads);
    for (unsigned t = 0; t < threads; ++t) {
        const Log &log = shared->logs[t];
        operations += log.begun;
        durable += log.flushed;
        for (std::uint64_t n = 0; n < log.begun; ++n) {
            const Operation &op = log.operations[n];
            for (std::uint64_t i = op.at; i < op.at + op.length; ++i) {
                owner[i] = static_cast<unsigned char>(t);
                if (n < log.flushed)
                    base[i] = op.byte(i);
            }
        }
    }
    for (std::uint64_t i = 0; i < base.size(); ++i)
        if (got[i] != base[i] && !(owner[i] < max_threads && allowed(shared->logs[owner[i]], i, got[i])))
            return std::fprintf(stderr, "FAILED: seed %llu: byte %#llx is %#x; flushed was %#x\n",
                                static_cast<unsigned long long>(seed), static_cast<unsigned long long>(i),
                                std::to_integer<unsigned>(got[i]), std::to_integer<unsigned>(base[i])),
                   1;
    std::printf("seed %llu: killed after %llu operations (%llu flushed by %llu flushes), %llu maintenance passes\n",
                static_cast<unsigned long long>(seed), static_cast<unsigned long long>(operations),
                static_cast<unsigned long long>(durable), static_cast<unsigned long long>(shared->flushes.load()),
                static_cast<unsigned long long>(shared->passes.load()));
    return 0;
} catch (const std::exception &e) {
    std::fprintf(stderr, "FAILED: %s\n", e.what());
    return 1;
}
