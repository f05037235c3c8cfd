// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The n-th read, write, sync, truncation, punch of a run fails, for many n, of every kind of run. What must hold:
//
//   - the error reaches a caller (or, of an ENOSPC, was worked around), and nothing else goes wrong;
//   - the run goes on, the disk reads what the guest wrote, and the image ends sound;
//   - a power cut at any moment, before the fault or after it, loses nothing flushed and leaves no corruption;
//   - after a failed sync every write fails, and nothing is written, punched or truncated any more.
//
//   fault-matrix [RUNS of each kind=6] [SEED=random] [WORKLOAD]        RUNS 0: every n
#include "tests/fault/image_builder.h"
#include "tests/fault/image_judge.h"
#include "tests/fault/power_cut.h"
#include "tests/fault/workloads.h"

#include <chrono>
#include <cstdio>
#include <fstream>

using namespace qlean;
using namespace qlean::fault;

namespace {

struct Kind {
    const char *name;
    unsigned ops;
    int code;
    std::uint64_t partial;
    bool may_be_absorbed; ///< the engine may work around it
};
constexpr Kind kinds[] = {
    {"write fails with EIO", mask(Op::write), EIO, 0, false},
    {"write fails with EIO after a part", mask(Op::write), EIO, 512, false},
    {"write fails with ENOSPC", mask(Op::write), ENOSPC, 0, true},
    {"sync fails with EIO", mask(Op::sync), EIO, 0, false},
    {"sync fails with ENOSPC", mask(Op::sync), ENOSPC, 0, false},
    {"truncate fails with EIO", mask(Op::truncate), EIO, 0, false},
    {"truncate fails with ENOSPC", mask(Op::truncate), ENOSPC, 0, true},
    {"punch fails with EIO", mask(Op::punch), EIO, 0, true},
    {"zeroing fails with EIO", mask(Op::zero), EIO, 0, false},
    {"reserving fails with ENOSPC", mask(Op::reserve), ENOSPC, 0, true},
    {"read fails with EIO", mask(Op::read), EIO, 0, false},
};
constexpr int cuts_per_run = 16;

void require(bool condition, const std::string &what) {
    if (!condition)
        throw std::runtime_error(what);
}

/// No corruption, and the snapshots and bitmaps are what they were in the original, or what they had to become.
void require_sound(const Bytes &image, const Run &run, const std::string &when) {
    std::optional<std::string> wrong;
    if (const Verdict verdict = judge(image); !verdict.sound())
        wrong = verdict.text();
    else if (!(wrong = judge_snapshots(image, run.snapshots)))
        wrong = judge_bitmaps(image, run.original);
    if (!wrong)
        return;
    std::ofstream("fault-matrix-failed.qcow2", std::ios::binary)
        .write(reinterpret_cast<const char *>(image.data()), static_cast<std::streamsize>(image.size()));
    throw std::runtime_error(when + ": " + *wrong + "\nthe image is fault-matrix-failed.qcow2");
}

bool fails(const std::function<void()> &request) {
    try {
        request();
        return false;
    } catch (const Error &) {
        return true;
    }
}

/// After a failed sync nothing more happens to the file, and every request that writes says so.
void require_poisoned(Run &run) {
    const std::size_t before = run.disk->recorded();
    Image &image = *run.image;
    require(fails([&] { image.write(bytes_of(512, 1), {0}); }), "a write was accepted after a failed sync");
    require(fails([&] { image.trim({0}, image.size()); }), "a trim was accepted after a failed sync");
    require(fails([&] { image.zero({0}, 512, Image::Zero::may_trim, false); }),
            "zeroing was accepted after a failed sync");
    require(fails([&] { image.flush(); }), "a flush succeeded after a failed sync");
    require(fails([&] { image.give_back(); }), "space was given back after a failed sync");
    require(fails([&] { compact_all(image); }), "a compaction went on after a failed sync");
    image.close();
    require(run.disk->recorded() == before, "the file was changed after a failed sync");
    run.guest->check(0, image.size());
    const auto &events = run.disk->events();
    const auto failed =
        std::find_if(events.begin(), events.end(), [](const Event &e) { return e.kind == Event::Kind::sync_failed; });
    for (auto e = failed; e != events.end(); ++e)
        require(e->kind != Event::Kind::zeroes && e->kind != Event::Kind::length && e->kind != Event::Kind::sync_began,
                "the file was punched, truncated or synced after a failed sync");
}

/// The run with its n-th operation failing. False: it has no n-th.
bool run_with_fault(const Workload &workload, std::uint64_t seed, const Kind &kind, std::uint64_t n) {
    Run run = start(workload, seed);
    run.tolerant = true;
    run.guest->forgive_failures(true);
    Fault fault;
    fault.ops = kind.ops;
    fault.nth = n;
    fault.code = kind.code;
    fault.partial = kind.partial;
    run.disk->fail(fault);
    workload.go(run);
    if (!run.disk->struck())
        return false;
    run.disk->heal();
    require(kind.may_be_absorbed || !run.errors.empty(), "the error reached nobody");
    // A switch of homes that fails half-way poisons as well: nobody knows which one the file points to.
    const bool poisoned = run.image->state().write_back.poisoned();
    for (const Error &error : run.errors)
        require(error.errno_value() == kind.code || (poisoned && error.kind() == Error::Kind::denied),
                std::string("another error followed: ") + error.what());
    require(poisoned || kind.ops != mask(Op::sync), "a sync failed, but the image is not poisoned");
    if (poisoned) {
        require_poisoned(run);
    } else {
        for (int i = 0; i < 10; ++i)
            run.guest->step({50, 15, 15, 10, 10});
        run.guest->check(0, run.image->size());
        compact_all(*run.image);
        run.guest->check(0, run.image->size());
        run.guest->flush();
        run.image->close();
        require_sound(run.disk->bytes(), run, "after the end");
        require(guest_bytes(run.disk->bytes()) == run.guest->now(), "after the end the disk differs");
    }
    run.image.reset();

    std::mt19937_64 random(seed * 100 + n);
    PowerCuts cuts(*run.disk);
    std::vector<std::size_t> moments;
    for (int i = 0; i < cuts_per_run; ++i)
        moments.push_back(random() % cuts.moments());
    // Most of what can go wrong goes wrong soon after the fault.
    std::sort(moments.begin(), moments.end());
    for (const std::size_t moment : moments) {
        cuts.move_to(moment);
        for (const Bytes &image : {cuts.image(random_fates(cuts, random)), cuts.image_of_killed()}) {
            const std::string when = fmt::format("power cut at moment {} of {}", moment, cuts.moments());
            require_sound(image, run, when);
            if (const auto lost = run.guest->verdict(guest_bytes(image), moment))
                throw std::runtime_error(when + ": " + *lost);
        }
    }
    return true;
}

} // namespace

int main(int argc, char **argv) try {
    const std::uint64_t runs = argc > 1 ? std::stoull(argv[1]) : 6;
    const std::uint64_t seed = argc > 2 ? std::stoull(argv[2]) : std::random_device{}() % 1000000;
    const std::string only = argc > 3 ? argv[3] : "";
    std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
    std::mt19937_64 random(seed);
    std::uint64_t struck = 0, failures = 0;
    for (const Workload &workload : workloads()) {
        if (!workload.repeatable || (!only.empty() && only != workload.name))
            continue;
        std::uint64_t counts[std::size(kinds)];
        {
            Run clean = start(workload, seed);
            std::uint64_t before[std::size(kinds)];
            for (std::size_t k = 0; k < std::size(kinds); ++k)
                before[k] = clean.disk->count(kinds[k].ops);
            workload.go(clean);
            for (std::size_t k = 0; k < std::size(kinds); ++k)
                counts[k] = clean.disk->count(kinds[k].ops) - before[k];
        }
        for (std::size_t k = 0; k < std::size(kinds); ++k) {
            const std::uint64_t tries = runs == 0 ? counts[k] : std::min(runs, counts[k]);
            for (std::uint64_t i = 0; i < tries; ++i) {
                // Spread over the run, and not at the same places with each seed.
                const std::uint64_t n = runs == 0 ? i + 1 : 1 + (i * counts[k] + random() % counts[k]) / tries;
                try {
                    struck += run_with_fault(workload, seed, kinds[k], n);
                } catch (const std::exception &e) {
                    std::fprintf(stderr, "FAILED: workload '%s', seed %llu, number %llu of %llu, %s:\n%s\n",
                                 workload.name, static_cast<unsigned long long>(seed),
                                 static_cast<unsigned long long>(n), static_cast<unsigned long long>(counts[k]),
                                 kinds[k].name, e.what());
                    ++failures;
                    break;
                }
            }
        }
    }
    std::printf("seed %llu: %llu faults struck, %llu kinds of runs failed\n", static_cast<unsigned long long>(seed),
                static_cast<unsigned long long>(struck), static_cast<unsigned long long>(failures));
    return failures != 0 || struck == 0;
} catch (const std::exception &e) {
    std::fprintf(stderr, "FAILED: %s\n", e.what());
    return 1;
}
