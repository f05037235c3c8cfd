// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Random guest I/O against a plain array of bytes, while the record is reclaimed on another connection all the time.
// Each guest thread owns blocks of granules that share clusters with the blocks of others, so that nobody's bytes are
// ambiguous but every cluster is fought over. A discarded byte may read as it was or as zero until it is written again.
//
// usage: reclaim-model-test SOCKET SECONDS [SEED]

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include <libnbd.h>

namespace {

constexpr std::uint64_t granule = 4096;
constexpr unsigned guests = 6;

struct Close {
    void operator()(nbd_handle *h) const { nbd_close(h); }
};
using Handle = std::unique_ptr<nbd_handle, Close>;

void must(bool ok, const char *what) {
    if (ok)
        return;
    std::fprintf(stderr, "%s: %s\n", what, nbd_get_error());
    std::exit(1);
}

Handle connect(const std::string &socket, const char *name) {
    Handle h(nbd_create());
    must(h != nullptr, "create");
    must(nbd_set_export_name(h.get(), name) == 0, "set export name");
    must(nbd_add_meta_context(h.get(), LIBNBD_CONTEXT_BASE_ALLOCATION) == 0, "ask for block status");
    must(nbd_connect_unix(h.get(), socket.c_str()) == 0, "connect");
    return h;
}

struct Block {
    std::uint64_t begin, end;
};

class Guest {
  public:
    Guest(const std::string &socket, unsigned number, std::uint32_t seed, std::vector<unsigned char> &model,
          std::vector<unsigned char> &discarded)
        : handle_(connect(socket, "")), number_(number), random_(seed + number), model_(model), discarded_(discarded) {}

    void own(Block b) { blocks_.push_back(b); }

    void run(const std::atomic<bool> &stop) {
        while (!stop && !blocks_.empty())
            step();
        for (const Block &b : blocks_)
            verify(b);
    }

    std::uint64_t steps() const { return steps_; }

  private:
    void step() {
        steps_++;
        const Block &block = blocks_[random_() % blocks_.size()];
        Block part = block;
        if (random_() % 2) { // any bytes of it, aligned to nothing
            part.begin += random_() % (block.end - block.begin);
            part.end = part.begin + 1 + random_() % (block.end - part.begin);
        }
        const std::uint64_t length = part.end - part.begin;
        unsigned char *expected = model_.data() + part.begin;
        unsigned char *discarded = discarded_.data() + part.begin;
        const unsigned operation = random_() % 8;
        if (operation <= 4)
            std::memset(discarded, 0, length);
        switch (operation) {
        case 0:
        case 1:
            for (std::uint64_t i = 0; i < length; i++)
                expected[i] = static_cast<unsigned char>(random_() | 1);
            must(nbd_pwrite(handle_.get(), expected, length, part.begin, 0) == 0, "write");
            break;
        case 2:
            std::memset(expected, 0, length);
            must(nbd_pwrite(handle_.get(), expected, length, part.begin, 0) == 0, "write zeroes");
            break;
        case 3:
            std::memset(expected, 0, length);
            must(nbd_zero(handle_.get(), length, part.begin, LIBNBD_CMD_FLAG_NO_HOLE) == 0, "zero without a hole");
            break;
        case 4:
            std::memset(expected, 0, length);
            must(nbd_zero(handle_.get(), length, part.begin, 0) == 0, "zero");
            break;
        case 5:
            std::memset(discarded, 1, length);
            must(nbd_trim(handle_.get(), length, part.begin, LIBNBD_CMD_FLAG_FUA) == 0, "trim");
            break;
        default:
            verify(part);
        }
    }

    void verify(Block part) {
        std::vector<unsigned char> found(part.end - part.begin);
        must(nbd_pread(handle_.get(), found.data(), found.size(), part.begin, 0) == 0, "read");
        for (std::size_t i = 0; i < found.size(); i++)
            if (found[i] != model_[part.begin + i] && !(found[i] == 0 && discarded_[part.begin + i])) {
                std::fprintf(stderr, "guest %u, offset %llu: read %d, expected %d\n", number_,
                             static_cast<unsigned long long>(part.begin + i), found[i], model_[part.begin + i]);
                std::_Exit(1);
            }
    }

    Handle handle_;
    unsigned number_;
    std::mt19937 random_;
    std::vector<unsigned char> &model_;
    std::vector<unsigned char> &discarded_;
    std::vector<Block> blocks_;
    std::uint64_t steps_ = 0;
};

int count_to_do(void *data, const char *, std::uint64_t, std::uint32_t *entries, std::size_t n, int *) {
    for (std::size_t i = 0; i + 1 < n; i += 2)
        if (entries[i + 1] == 0)
            *static_cast<std::uint64_t *>(data) += entries[i];
    return 0;
}

/// Reads the plan and carries it out until told to stop; returns how many bytes were ever planned.
std::uint64_t reclaim(const std::string &socket, std::uint64_t size, std::uint32_t seed,
                      const std::atomic<bool> &stop) {
    const Handle h = connect(socket, "reclaim");
    std::mt19937 random(seed);
    std::uint64_t planned = 0;
    while (!stop) {
        const std::uint64_t begin = random() % size, length = 1 + random() % (size - begin);
        const nbd_extent_callback count{count_to_do, &planned, nullptr};
        must(nbd_block_status(h.get(), length, begin, count, 0) == 0, "read the plan");
        must(nbd_cache(h.get(), length, begin, 0) == 0, "reclaim");
        if (random() % 16 == 0)
            must(nbd_flush(h.get(), 0) == 0, "flush");
    }
    return planned;
}

} // namespace

int main(int argc, char **argv) {
    if (argc < 3)
        return 2;
    const std::string socket = argv[1];
    const auto seconds = std::chrono::duration<double>(std::atof(argv[2]));
    const std::uint32_t seed =
        argc > 3 ? static_cast<std::uint32_t>(std::strtoul(argv[3], nullptr, 10)) : std::random_device{}();
    std::printf("seed %u\n", seed);
    std::fflush(stdout);

    const auto size = static_cast<std::uint64_t>(nbd_get_size(connect(socket, "").get()));
    std::vector<unsigned char> model(size), discarded(size);
    std::vector<Guest> guest;
    for (unsigned i = 0; i < guests; i++)
        guest.emplace_back(socket, i, seed, model, discarded);
    std::mt19937 random(seed);
    for (std::uint64_t at = 0; at < size;) {
        const std::uint64_t end = std::min(size, at + granule * (1 + random() % 12));
        guest[random() % guests].own({at, end});
        at = end;
    }

    std::atomic<bool> stop{false};
    std::uint64_t planned = 0;
    std::vector<std::thread> threads;
    for (Guest &g : guest)
        threads.emplace_back([&g, &stop] { g.run(stop); });
    threads.emplace_back([&] { planned = reclaim(socket, size, seed, stop); });
    std::this_thread::sleep_for(seconds);
    stop = true;
    for (std::thread &t : threads)
        t.join();

    // With nothing in flight, what reads as the guests left it must still do so once everything is given back.
    const Handle h = connect(socket, "reclaim");
    must(nbd_cache(h.get(), size, 0, 0) == 0, "reclaim the rest");
    std::uint64_t steps = 0;
    for (Guest &g : guest) {
        steps += g.steps();
        g.run(stop);
    }
    std::printf("%llu requests, %llu bytes planned\n", static_cast<unsigned long long>(steps),
                static_cast<unsigned long long>(planned));
    return planned > 0 ? 0 : 1;
}
