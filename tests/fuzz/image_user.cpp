// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "tests/fuzz/image_user.h"

#include "lib/check/check.h"
#include "lib/compact/compact.h"
#include "lib/compact/snapshot_delete.h"
#include "lib/compact/zero_scan.h"
#include "lib/snapshot_disk.h"

#include <cstring>

namespace qlean::fuzz {

namespace {

constexpr std::uint64_t most_write = 16 * 1024, most_range = 1024 * 1024;

} // namespace

ImageUser::ImageUser(std::shared_ptr<MemoryDisk> disk, const ImageCase &from, Trust trust)
    : disk_(std::move(disk)), data_(std::make_shared<MemoryDisk>(from.data)), trust_(trust) {}

std::unique_ptr<File> ImageUser::data_file() const { return std::make_unique<MemoryFile>(data_); }

void ImageUser::open(std::uint64_t how) {
    Image::Options options;
    options.cache_bytes = 65536;
    options.read_only = trust_ == Trust::none && how % 8 == 1;
    if (how % 4 >= 2 && !options.read_only)
        options.repair = how % 4 == 2 ? Repair::all : Repair::leaks;
    options.open_data = [this](const Header &) { return data_file(); };
    image_ = Image::open(std::make_unique<MemoryFile>(disk_), options);
    if (trust_ == Trust::none || !model_.empty())
        return;
    model_.resize(image_->size());
    image_->read(model_, {0});
}

void ImageUser::close() {
    if (!image_)
        return;
    if (trust_ == Trust::all)
        read(0, image_->size());
    image_->close();
    image_.reset();
    if (trust_ == Trust::none)
        return;
    open(0);
    read(0, image_->size());
    image_->close();
    image_.reset();
}

void ImageUser::operate(Input &in) {
    if (!image_)
        return; // what the last server left, the next one refused: only an altered image may be like that
    constexpr std::uint64_t guest_kinds = 10, kinds = 19;
    const std::uint64_t which = in.below(kinds);
    try {
        if (which < guest_kinds)
            guest_request(which, in);
        else
            maintain(which - guest_kinds, in);
    } catch (const Error &) {
        if (trust_ == Trust::all)
            throw;
    }
}

void ImageUser::guest_request(std::uint64_t which, Input &in) {
    const std::uint64_t size = image_->size();
    // From the beginning, or back from the end of a disk that may be very large.
    const std::uint64_t from = in.byte(), within = in.number(3);
    const std::uint64_t at = size == 0 ? 0 : from % 4 == 3 ? size - 1 - within % size : within % size;
    const std::uint64_t most = std::min(size - at, which < 5 ? most_write : most_range);
    const std::uint64_t length = most == 0 ? 0 : 1 + in.number(2) * (which < 5 ? 1 : 16) % most;
    if (length == 0)
        return image_->flush();
    switch (which) {
    case 0:
        return read(at, length);
    case 1:
    case 2:
    case 3:
        return write(at, length, static_cast<unsigned>(in.byte()));
    case 4: // zeroes, for zero scans to find
        return write(at, length, 0);
    case 5:
        image_->trim({at}, length);
        return trimmed(at, length);
    case 6:
    case 7:
        image_->zero({at}, length, which == 6 ? Image::Zero::may_trim : Image::Zero::keep_space, false);
        if (trust_ == Trust::all)
            std::fill_n(model_.begin() + static_cast<std::ptrdiff_t>(at), length, std::byte{0});
        return;
    case 8:
        image_->prefetch({at}, length);
        for (std::uint64_t next = at; const auto &e : image_->extents({at}, length, 1 + in.byte())) {
            require(e.at.value == next && e.length != 0 && e.length <= at + length - next, "extents with gaps");
            next += e.length;
        }
        return;
    default:
        return image_->flush();
    }
}

void ImageUser::maintain(std::uint64_t which, Input &in) {
    const std::uint64_t size = image_->size();
    const std::uint64_t at = in.number(3) % std::max<std::uint64_t>(size, 1);
    const std::uint64_t length = std::min(size - at, 1 + in.number(2) * 16);
    State &state = image_->state();
    switch (which) {
    case 0:
    case 1: {
        const std::uint64_t connection = ++connections_;
        Compact compact(*image_, ownership_, gauges_, connection,
                        connection % 2 != 0 ? state.geometry.bytes(3) : Compact::most_by_request);
        run(compact, which == 0 ? 0 : at, which == 0 ? std::min(size, most_range) : length);
        return;
    }
    case 2: {
        ZeroScan zeroes(*image_, gauges_);
        run(zeroes, at, length);
        return;
    }
    case 3:
        check_image(state, state.read_only || in.byte() % 2 != 0 ? Repair::none : Repair::leaks, never);
        return;
    case 4:
        survey_image(state, never);
        return;
    case 5:
        return look_at_snapshots(at, length);
    case 6:
        return delete_snapshot(in.byte());
    case 7: {
        const std::uint64_t wanted = round_up(size + length, 512);
        try {
            image_->require_resizable(wanted);
        } catch (const Error &) {
            return; // as snapshots and bitmaps may, of a sound image too
        }
        image_->resize(wanted);
        if (trust_ == Trust::all)
            model_.resize(wanted);
        return;
    }
    default: // another server takes over
        if (!state.read_only)
            image_->close();
        image_.reset();
        return open(in.byte());
    }
}

void ImageUser::read(std::uint64_t at, std::uint64_t length) {
    Bytes into(length);
    image_->read(into, {at});
    if (trust_ == Trust::all)
        require(length == 0 || std::memcmp(into.data(), model_.data() + at, length) == 0,
                "the disk is not what was written");
}

void ImageUser::write(std::uint64_t at, std::uint64_t length, unsigned value) {
    const Bytes bytes = fault::bytes_of(length, value);
    image_->write(bytes, {at});
    if (trust_ == Trust::all)
        std::copy(bytes.begin(), bytes.end(), model_.begin() + static_cast<std::ptrdiff_t>(at));
}

void ImageUser::trimmed(std::uint64_t at, std::uint64_t length) {
    if (trust_ == Trust::none)
        return;
    Bytes now(length);
    image_->read(now, {at});
    for (std::uint64_t i = 0; i < length; ++i) {
        require(now[i] == model_[at + i] || now[i] == std::byte{0}, "a trim made something of nothing");
        model_[at + i] = now[i];
    }
}

void ImageUser::run(Maintenance &operation, std::uint64_t at, std::uint64_t length) {
    if (length != 0) // nobody can ask a disk of no size for anything but a flush
        for (const auto &planned : operation.plan({at}, length, 64, never))
            require(planned.at.value >= at && planned.length <= length, "a plan beyond what was asked for");
    if (image_->read_only())
        return;
    if (length != 0)
        operation.run({at}, length, never);
    operation.commit(never);
}

void ImageUser::look_at_snapshots(std::uint64_t at, std::uint64_t length) {
    State &state = image_->state();
    for (const auto &snapshot : state.snapshots.list()) {
        auto use = state.snapshots.use(snapshot->entry().name);
        if (!use)
            continue;
        SnapshotDisk disk(state, std::move(*use));
        if (at >= disk.size())
            continue;
        Bytes into(std::min({length, disk.size() - at, most_write}));
        disk.read(into, {at});
        disk.extents({at}, into.size(), 16);
        disk.prefetch({at}, into.size());
    }
}

void ImageUser::delete_snapshot(std::uint64_t which) {
    const auto all = image_->state().snapshots.list();
    if (all.empty() || image_->read_only())
        return;
    const SnapshotEntry entry = all[which % all.size()]->entry();
    SnapshotDelete gone(*image_, ownership_, ++connections_, which % 2 != 0 ? entry.id : entry.name);
    run(gone, 0, std::min(image_->size(), most_range));
}

} // namespace qlean::fuzz
