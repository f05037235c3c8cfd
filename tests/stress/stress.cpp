// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Random guest I/O from several threads against a byte-array model, with compaction and zero scans beside it.
//
// Every byte of the disk has one thread that may change it, so the model needs no lock: a stripe of `slot` bytes in
// turn per thread, small slots (several to a cluster) in the lower half of the disk, large ones in the upper half.
// Exit status 0: every byte was what the model says, at all times and at the end, after reopening.
//
//   stress IMAGE SEED SECONDS [threads=4] [maintenance=all|none|compact|zeroes]
#include "lib/check/check.h"
#include "lib/compact/compact.h"
#include "lib/compact/zero_scan.h"
#include "lib/error.h"
#include "lib/image.h"

#include <chrono>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>

using namespace qlean;

namespace {

std::atomic<bool> failed{false};

struct Model {
    std::vector<std::byte> bytes;
};

[[noreturn]] void fail(const std::string &text) {
    failed = true;
    std::fprintf(stderr, "FAILED: %s\n", text.c_str());
    std::fflush(stderr);
    std::_Exit(1);
}

class Guest {
  public:
    Guest(Image &image, Model &model, unsigned id, unsigned threads, std::uint64_t seed)
        : image_(image), model_(model), id_(id), threads_(threads), random_(seed * 1000 + id) {}

    void run(std::chrono::steady_clock::time_point until) {
        while (std::chrono::steady_clock::now() < until && !failed)
            step();
    }
    std::uint64_t operations = 0;

  private:
    std::uint64_t pick(std::uint64_t n) { return n == 0 ? 0 : random_() % n; }

    /// A random range inside a slot of this thread.
    std::pair<std::uint64_t, std::uint64_t> range() {
        const std::uint64_t size = image_.size(), half = size / 2;
        const std::uint64_t cluster = image_.geometry().cluster_size();
        const bool large = pick(2);
        const std::uint64_t slot =
            large ? std::max<std::uint64_t>(8 * cluster, 65536) : std::max<std::uint64_t>(cluster / 4, 512);
        const std::uint64_t base = large ? half : 0, end = large ? size : half;
        const std::uint64_t slots = divide_up(end - base, slot);
        const std::uint64_t mine = (slots + threads_ - 1 - id_) / threads_;
        if (mine == 0)
            return {0, 0};
        const std::uint64_t first = base + (pick(mine) * threads_ + id_) * slot;
        const std::uint64_t last = std::min(first + slot, end);
        switch (pick(4)) {
        case 0:
            return {first, last - first};
        case 1: { // whole clusters
            const std::uint64_t a = round_up(first + pick(last - first), cluster), b = round_down(last, cluster);
            return a < b ? std::pair{a, std::min(b - a, cluster * (1 + pick(4)))} : std::pair{first, last - first};
        }
        default: {
            const std::uint64_t a = first + pick(last - first);
            return {a, 1 + pick(last - a)};
        }
        }
    }

    void check(std::uint64_t at, std::uint64_t n, const char *when) {
        std::vector<std::byte> got(n);
        image_.read(got, {at});
        if (std::memcmp(got.data(), model_.bytes.data() + at, n) == 0)
            return;
        for (std::uint64_t i = 0; i < n; ++i)
            if (got[i] != model_.bytes[at + i])
                fail(fmt::format("{}: byte {:#x} (range {:#x}+{:#x}) is {:#x}, should be {:#x}", when, at + i, at, n,
                                 std::to_integer<int>(got[i]), std::to_integer<int>(model_.bytes[at + i])));
    }

    void step() {
        const auto [at, n] = range();
        if (n == 0)
            return;
        ++operations;
        const unsigned op = static_cast<unsigned>(pick(100));
        if (op < 35) {
            std::vector<std::byte> data(n);
            const auto value = pick(8) == 0 ? std::byte{0} : std::byte(1 + pick(255));
            for (std::uint64_t i = 0; i < n; ++i)
                data[i] = value == std::byte{0} ? value : std::byte(std::to_integer<unsigned>(value) ^ (i & 7));
            image_.write(data, {at});
            std::memcpy(model_.bytes.data() + at, data.data(), n);
        } else if (op < 70) {
            check(at, n, "read");
        } else if (op < 82) {
            image_.trim({at}, n);
            std::vector<std::byte> got(n);
            image_.read(got, {at});
            for (std::uint64_t i = 0; i < n; ++i)
                if (got[i] != model_.bytes[at + i] && got[i] != std::byte{0})
                    fail(fmt::format("trimmed byte {:#x} is neither what it was nor zero", at + i));
            std::memcpy(model_.bytes.data() + at, got.data(), n);
        } else if (op < 96) {
            image_.zero({at}, n, pick(2) ? Image::Zero::may_trim : Image::Zero::keep_space, pick(2));
            std::memset(model_.bytes.data() + at, 0, n);
            check(at, n, "after zero");
        } else if (op < 98) {
            std::uint64_t covered = at;
            for (const auto &e : image_.extents({at}, n, 1000)) {
                if (e.at.value != covered)
                    fail("extents are not contiguous");
                covered += e.length;
                if (e.zero)
                    for (std::uint64_t i = 0; i < e.length; ++i)
                        if (model_.bytes[e.at.value + i] != std::byte{0})
                            fail(fmt::format("extent at {:#x} claims zeroes over data", e.at.value));
            }
        } else {
            image_.flush();
        }
    }

    Image &image_;
    Model &model_;
    unsigned id_, threads_;
    std::mt19937_64 random_;
};

/// Does it, unless somebody else owns the image for the moment.
template <class F>
void unless_busy(F &&f) {
    try {
        f();
    } catch (const Error &error) {
        if (error.kind() != Error::Kind::busy)
            throw;
    }
}

} // namespace

int main(int argc, char **argv) try {
    if (argc < 4)
        return std::fprintf(stderr, "usage: stress IMAGE SEED SECONDS [threads]\n"), 2;
    const std::uint64_t seed = std::stoull(argv[2]);
    const double seconds = std::stod(argv[3]);
    const unsigned threads = argc > 4 ? static_cast<unsigned>(std::stoul(argv[4])) : 4;
    const std::string maintenance = argc > 5 ? argv[5] : "all"; // or none, compact, zeroes
    Image::Options options;
    options.cache_bytes = 256 * 1024; // small, so that slices are recycled and written back all the time
    auto image = Image::open(argv[1], options);
    image->on_background_error([](const std::exception &e) { fail(std::string("background: ") + e.what()); });
    image->start_housekeeping();
    Model model{std::vector<std::byte>(image->size())};
    image->read(model.bytes, {0});

    const bool was_clean = check_image(image->state(), Repair::none, never).leaks == 0;
    const auto until = std::chrono::steady_clock::now() + std::chrono::milliseconds(static_cast<int>(seconds * 1000));
    std::vector<Guest> guests;
    for (unsigned i = 0; i < threads; ++i)
        guests.emplace_back(*image, model, i, threads, seed);
    std::vector<std::thread> running;
    for (auto &guest : guests)
        running.emplace_back([&] {
            try {
                guest.run(until);
            } catch (const std::exception &e) {
                fail(e.what());
            }
        });

    MoveOwnership ownership;
    Gauges gauges;
    std::uint64_t connection = 0, passes = 0;
    const StopCheck go_on = [] { return false; };
    running.emplace_back([&] {
        try {
            std::mt19937_64 random(seed);
            std::unique_ptr<Compact> idle; // has a plan, and acts on it much later: what it found may have changed
            while (maintenance != "none" && std::chrono::steady_clock::now() < until) {
                std::unique_ptr<Maintenance> op;
                if (random() % 4 == 0) {
                    if (idle)
                        unless_busy([&] { idle->commit(go_on); });
                    idle = std::make_unique<Compact>(*image, ownership, gauges, ++connection);
                    idle->plan({0}, image->size(), 1);
                }
                if (maintenance == "zeroes" || (maintenance == "all" && random() % 4 == 0))
                    op = std::make_unique<ZeroScan>(*image, gauges);
                else
                    op =
                        std::make_unique<Compact>(*image, ownership, gauges, ++connection,
                                                  random() % 2 ? Compact::most_by_request : image->geometry().bytes(7));
                for (int round = 0; round < 3; ++round) {
                    if (connection % 2 == 0)
                        unless_busy([&] { op->run({0}, image->size(), go_on); });
                    const auto plan = op->plan({0}, image->size(), 100000);
                    std::atomic<std::size_t> next{0};
                    std::vector<std::thread> workers;
                    for (int w = 0; w < 3; ++w)
                        workers.emplace_back([&] {
                            try {
                                for (std::size_t i; (i = next++) < plan.size();)
                                    unless_busy([&] {
                                        if (plan[i].to_do)
                                            op->run(plan[i].at, plan[i].length, go_on);
                                        else if (i % 8 == 7)
                                            op->commit(go_on); // beside what the others run
                                    });
                            } catch (const std::exception &e) {
                                fail(std::string("maintenance: ") + e.what());
                            }
                        });
                    for (auto &w : workers)
                        w.join();
                    unless_busy([&] { op->commit(go_on); });
                }
                ++passes;
            }
        } catch (const std::exception &e) {
            fail(std::string("maintenance: ") + e.what());
        }
    });
    // Walks all the time, beside whoever moves: none may find anything wrong, nor a leak that was not there before.
    std::uint64_t looks = 0;
    running.emplace_back([&] {
        try {
            for (std::uint64_t id = 1000000; std::chrono::steady_clock::now() < until; ++id) {
                Compact(*image, ownership, gauges, id).plan({0}, image->size(), 100000);
                try {
                    ownership.claim("check", id);
                } catch (const Error &) {
                    continue; // somebody moves
                }
                const CheckReport report = check_image(image->state(), Repair::leaks, go_on);
                ownership.release(id);
                if (report.corruptions + report.check_errors != 0 ||
                    (was_clean && report.leaks + report.leaks_fixed != 0))
                    fail("the check found: " + (report.problems.empty() ? std::string("?") : report.problems[0]));
                ++looks;
            }
        } catch (const std::exception &e) {
            fail(std::string("walk: ") + e.what());
        }
    });
    for (auto &thread : running)
        thread.join();

    std::uint64_t operations = 0;
    for (auto &guest : guests)
        operations += guest.operations;
    std::vector<std::byte> got(image->size());
    image->read(got, {0});
    if (got != model.bytes)
        fail("the disk differs from the model before closing");
    image->close();
    image.reset();
    options.read_only = true;
    image = Image::open(argv[1], options);
    image->read(got, {0});
    if (got != model.bytes)
        fail("the disk differs from the model after reopening");
    std::printf("seed %llu: %llu operations, %llu maintenance passes, %llu checks, %llu bytes moved\n",
                static_cast<unsigned long long>(seed), static_cast<unsigned long long>(operations),
                static_cast<unsigned long long>(passes), static_cast<unsigned long long>(looks),
                static_cast<unsigned long long>(gauges.moved_bytes.load()));
    return 0;
} catch (const std::exception &e) {
    std::fprintf(stderr, "FAILED: %s\n", e.what());
    return 1;
}
