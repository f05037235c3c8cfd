// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Cuts the power of recorded runs at many moments, and in many ways at each, and judges every image that could remain:
// the judge finds no corruption, the engine opens it, what was flushed is there. A few are asked of qemu-img as well,
// and a few are used and compacted afterwards.
//
//   power-cut [STATES=20000] [SEED=random] [WORKLOAD]      STATES 0: until it is stopped
//
// Counts distinct images. Exit status 0: all were sound. On a failure it prints how to repeat it, and leaves the image.
#include "lib/compact/compact.h"
#include "tests/fault/image_builder.h"
#include "tests/fault/image_judge.h"
#include "tests/fault/power_cut.h"
#include "tests/fault/workloads.h"

#include <chrono>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <sstream>
#include <thread>
#include <unordered_set>

using namespace qlean;
using namespace qlean::fault;

namespace {

constexpr std::size_t exhausted_up_to = 6; ///< changes: all subsets
constexpr unsigned qemu_every = 400, use_every = 100;

std::uint64_t hash(const Bytes &bytes) {
    std::uint64_t h[4] = {1, 2, 3, 4};
    std::size_t i = 0;
    for (; i + 32 <= bytes.size(); i += 32)
        for (int lane = 0; lane < 4; ++lane) {
            std::uint64_t x;
            std::memcpy(&x, bytes.data() + i + lane * 8, 8);
            h[lane] = (h[lane] ^ x) * 0x9e3779b97f4a7c15u;
            h[lane] ^= h[lane] >> 32;
        }
    std::uint64_t all = bytes.size();
    for (; i < bytes.size(); ++i)
        all = (all ^ std::to_integer<std::uint64_t>(bytes[i])) * 0x100000001b3u;
    for (const std::uint64_t x : h)
        all = (all ^ x) * 0x9e3779b97f4a7c15u ^ all >> 31;
    return all;
}

/// What a deleted snapshot may leave for a while: counts of one without COPIED, which cost a copy and harm nothing.
bool only_lacks_flags(const QemuVerdict &verdict) {
    std::istringstream lines(verdict.output);
    for (std::string line; std::getline(lines, line);)
        if (line.rfind("ERROR", 0) == 0 &&
            (line.find("OFLAG_COPIED") == std::string::npos || !line.ends_with("refcount=1")))
            return false;
    return verdict.status == 2;
}

/// The image goes on after the cut: a guest writes, everything is compacted, and it ends clean.
void use(const Bytes &image, std::uint64_t seed) {
    const auto disk = std::make_shared<FaultyDisk>(image);
    auto opened = open_image(disk);
    RecordedGuest guest(*opened, *disk, seed);
    for (int i = 0; i < 10; ++i)
        guest.step({});
    compact_all(*opened);
    guest.check(0, opened->size());
    opened->close();
    const Verdict verdict = judge(disk->bytes());
    if (!verdict.clean())
        throw std::runtime_error("after going on: " + verdict.text());
    if (guest_bytes(disk->bytes()) != guest.now())
        throw std::runtime_error("after going on: the disk differs");
    if (const QemuVerdict qemu = ask_qemu(disk->bytes()); qemu.available && qemu.status != 0)
        throw std::runtime_error("after going on: qemu-img check: " + qemu.output);
}

class Campaign {
  public:
    Campaign(std::uint64_t states, std::uint64_t seed) : wanted_(states), seed_(seed) {}

    void cut(const Workload &workload, std::uint64_t seed, std::uint64_t share) {
        Run run = start(workload, seed);
        workload.go(run);
        run.image.reset();
        if (const auto wrong = run.guest->verdict(run.guest->now(), run.disk->recorded() + 1))
            throw std::runtime_error(std::string(workload.name) + ": the test contradicts itself: " + *wrong);
        constexpr unsigned workers = 2;
        std::vector<std::thread> threads;
        for (unsigned w = 0; w < workers; ++w)
            threads.emplace_back([&, w] {
                try {
                    std::mt19937_64 random(seed * workers + w);
                    cut_some(workload, run, seed, random, share / workers + 1);
                } catch (const std::exception &e) {
                    std::fprintf(stderr, "FAILED: %s\n", e.what());
                    failed_ = true;
                }
            });
        for (auto &thread : threads)
            thread.join();
        moments_ += run.disk->recorded();
        ++runs_;
    }

    bool failed() const { return failed_; }
    std::uint64_t distinct() {
        const std::lock_guard guard(mutex_);
        return seen_.size();
    }
    void report(double seconds) {
        std::printf("seed %llu: %zu distinct images from %llu runs (%llu moments) in %.1f s; %llu asked of qemu-img, "
                    "%llu used on; "
                    "%s\n",
                    static_cast<unsigned long long>(seed_), seen_.size(), static_cast<unsigned long long>(runs_),
                    static_cast<unsigned long long>(moments_), seconds, static_cast<unsigned long long>(asked_.load()),
                    static_cast<unsigned long long>(used_.load()), failed_ ? "FAILED" : "all sound");
    }

  private:
    void cut_some(const Workload &workload, const Run &run, std::uint64_t seed, std::mt19937_64 &random,
                  std::uint64_t share) {
        PowerCuts cuts(*run.disk);
        constexpr std::uint64_t ways = 10;
        std::vector<std::size_t> moments;
        for (std::uint64_t i = 0; i < share / ways + 1; ++i)
            moments.push_back(random() % cuts.moments());
        std::sort(moments.begin(), moments.end());
        for (const std::size_t moment : moments) {
            cuts.move_to(moment);
            const auto check = [&](const Bytes &image, const char *how) {
                judge_state(workload, run, seed, moment, image, how, random());
            };
            check(cuts.image_of_killed(), "killed");
            const std::size_t n = cuts.uncertain().size();
            if (n <= exhausted_up_to && n > 0) {
                for (std::uint64_t number = 0; number + 1 < std::uint64_t{1} << n && !failed_; ++number)
                    check(cuts.image(numbered_fates(cuts, number)), "a power cut, all subsets");
            } else {
                check(cuts.image(std::vector<Fate>(n)), "a power cut, nothing written");
                for (std::uint64_t i = 0; i < ways && !failed_; ++i)
                    check(cuts.image(random_fates(cuts, random)), "a power cut");
            }
            if (failed_)
                return;
        }
    }

    void judge_state(const Workload &workload, const Run &run, std::uint64_t seed, std::size_t moment,
                     const Bytes &image, const char *how, std::uint64_t salt) {
        {
            // What must be there grows with the moment: the same image is judged again at a later one.
            const std::uint64_t h = hash(image);
            const std::lock_guard guard(mutex_);
            seen_.insert(h);
            if (!judged_.insert(h ^ moment * 0x9e3779b97f4a7c15u ^ seed).second)
                return;
        }
        std::string wrong;
        try {
            if (const Verdict verdict = judge(image); !verdict.sound())
                wrong = verdict.text();
            const Bytes disk = guest_bytes(image);
            Bytes known = disk; // the guest knows the disk as it was; what a resize added reads as zeroes
            known.resize(std::min(known.size(), run.guest->now().size()));
            const auto added = std::span(disk).subspan(known.size());
            if (const Bytes zeroes(added.size()); !same_bytes(added, zeroes) && wrong.empty())
                wrong = "what a resize added is not zero";
            if (const auto lost = run.guest->verdict(known, moment); lost && wrong.empty())
                wrong = *lost;
            if (const auto snapshots = judge_snapshots(image, run.snapshots); snapshots && wrong.empty())
                wrong = *snapshots;
            if (const auto bitmaps = judge_bitmaps(image, run.original); bitmaps && wrong.empty())
                wrong = *bitmaps;
            if (wrong.empty()) {
                auto opened = open_image(std::make_shared<FaultyDisk>(image), true);
                if (!same_bytes(read_all(*opened), disk))
                    wrong = "the engine reads another disk than the judge";
            }
            if (wrong.empty() && salt % qemu_every == 0) {
                ++asked_;
                if (const auto qemu = ask_qemu(image);
                    qemu.available && qemu.status != 0 && qemu.status != 3 && !only_lacks_flags(qemu))
                    wrong = "qemu-img check: " + qemu.output;
            }
            if (wrong.empty() && salt / qemu_every % use_every == 0) {
                ++used_;
                use(image, salt);
            }
        } catch (const std::exception &e) {
            wrong += e.what();
        }
        if (wrong.empty() || failed_.exchange(true))
            return;
        std::ofstream("power-cut-failed.qcow2", std::ios::binary)
            .write(reinterpret_cast<const char *>(image.data()), static_cast<std::streamsize>(image.size()));
        std::fprintf(stderr,
                     "FAILED: workload '%s', seed %llu, moment %zu (%s):\n%s\nthe image is power-cut-failed.qcow2\n",
                     workload.name, static_cast<unsigned long long>(seed), moment, how, wrong.c_str());
    }

    const std::uint64_t wanted_, seed_;
    std::mutex mutex_;
    std::unordered_set<std::uint64_t> seen_, judged_;
    std::atomic<bool> failed_{false};
    std::atomic<std::uint64_t> asked_{0}, used_{0};
    std::uint64_t runs_ = 0, moments_ = 0;
};

} // namespace

int main(int argc, char **argv) try {
    const std::uint64_t states = argc > 1 ? std::stoull(argv[1]) : 20000;
    const std::uint64_t seed = argc > 2 ? std::stoull(argv[2]) : std::random_device{}();
    const std::string only = argc > 3 ? argv[3] : "";
    const auto began = std::chrono::steady_clock::now();
    const auto seconds = [&] {
        return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
    };
    std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
    std::fflush(stdout);

    Campaign campaign(states, seed);
    constexpr std::uint64_t states_per_weight = 120;
    for (std::uint64_t round = 0; !campaign.failed() && (states == 0 || campaign.distinct() < states); ++round) {
        for (const Workload &workload : workloads()) {
            if (!only.empty() && only != workload.name)
                continue;
            // With one workload named, the seed is the run's own, as a failure prints it.
            const std::uint64_t run_seed = only.empty() ? seed * 1000 + round : seed + round;
            try {
                campaign.cut(workload, run_seed, states_per_weight * workload.weight);
            } catch (const std::exception &e) {
                std::fprintf(stderr, "FAILED: workload '%s', seed %llu: %s\n", workload.name,
                             static_cast<unsigned long long>(run_seed), e.what());
                return 1;
            }
            if (campaign.failed())
                break;
        }
        if (states == 0)
            campaign.report(seconds());
    }
    campaign.report(seconds());
    return campaign.failed() ? 1 : 0;
} catch (const std::exception &e) {
    std::fprintf(stderr, "FAILED: %s\n", e.what());
    return 1;
}
