// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// A whole image: an input chooses a sound one, fields of it to alter, and what is done with it then. Whatever that is,
// nothing but Error is thrown, and no more memory is taken than lib/README.md says. An image of which nothing was
// altered is a disk: each byte is what the model says, and at the end both the check and the judge of tests/fault find
// nothing wrong.
//
// An input: the image (1 byte), how many alterations (1 byte), those (image_change.h), then operations to its end.
#include "lib/check/check.h"
#include "tests/fault/image_judge.h"
#include "tests/fuzz/image_cases.h"
#include "tests/fuzz/image_change.h"
#include "tests/fuzz/image_user.h"
#include "tests/fuzz/memory_bound.h"

using namespace qlean;
using namespace qlean::fuzz;

namespace {

constexpr unsigned most_changes = 12, most_operations = 48;

void must_be_sound(const ImageCase &from, const MemoryDisk &disk) {
    MemoryFile file(std::make_shared<MemoryDisk>(disk));
    const CheckReport report = check_file(file);
    if (report.corruptions != 0 || report.check_errors != 0 || report.leaks > from.leaks)
        wrong(fmt::format("the check says of '{}': {} corruptions, {} leaks: {}", from.name, report.corruptions,
                          report.leaks, report.problems.empty() ? "" : report.problems.front()));
    if (!from.judged)
        return;
    Bytes bytes = disk.bytes;
    bytes.resize(disk.length);
    if (const auto verdict = fault::judge(bytes); !verdict.sound())
        wrong(fmt::format("the judge says of '{}': {}", from.name, verdict.text()));
    for (const auto &[name, snapshot] : fault::snapshot_disks(bytes))
        if (const auto before = from.snapshots.find(name); before == from.snapshots.end() || before->second != snapshot)
            wrong(fmt::format("snapshot '{}' of '{}' is not what it was", name, from.name));
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t *data, std::size_t size);
int LLVMFuzzerTestOneInput(const std::uint8_t *data, std::size_t size) {
    Input in(data, size);
    const ImageCase &from = image_cases()[in.below(image_cases().size())];
    const auto disk = std::make_shared<MemoryDisk>(from.bytes);
    const std::uint64_t changes = in.below(most_changes + 1);
    for (std::uint64_t i = 0; i < changes; ++i)
        change(*disk, from, in);
    if (changes != 0 && names_other_file(*disk, from))
        return 0;
    const MemoryBound bound(bound_for_image(disk->length, MemoryDisk::most_bytes));
    ImageUser user(disk, from, changes == 0 ? ImageUser::Trust::all : ImageUser::Trust::none);
    try {
        user.open(in.byte());
        for (unsigned i = 0; i < most_operations && !in.empty(); ++i)
            user.operate(in);
        user.close();
    } catch (const Error &error) {
        if (error.kind() == Error::Kind::no_space)
            return 0; // many of the larger requests fill the host
        if (changes == 0)
            wrong(fmt::format("a sound image, and: {}", error.what()));
    }
    if (changes == 0)
        must_be_sound(from, *disk);
    return 0;
}
