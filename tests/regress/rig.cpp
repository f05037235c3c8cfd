// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "tests/regress/rig.h"

namespace qlean::fault {

Rig::Rig(Bytes bytes, std::uint64_t cache_bytes)
    : disk(std::make_shared<FaultyDisk>(std::move(bytes))), cache_bytes_(cache_bytes) {
    model = guest_bytes(disk->bytes()); // not through the image, whose cache is still empty
    image = open_image(disk, false, cache_bytes);
}

void Rig::write(std::uint64_t at, std::uint64_t length, unsigned value) {
    image->write(bytes_of(length, value), {at});
    std::fill_n(model.begin() + static_cast<std::ptrdiff_t>(at), length, std::byte(value));
}

void Rig::trim(std::uint64_t at, std::uint64_t length) {
    if (at % cluster() != 0 || length % cluster() != 0)
        throw std::logic_error("this trim is not one of whole clusters");
    image->trim({at}, length);
    std::fill_n(model.begin() + static_cast<std::ptrdiff_t>(at), length, std::byte{0});
}

bool Rig::reads_right(std::uint64_t at, std::uint64_t length) {
    const Bytes bytes = read_some(*image, at, length);
    return std::equal(bytes.begin(), bytes.end(), model.begin() + static_cast<std::ptrdiff_t>(at));
}

std::uint64_t Rig::host_of(std::uint64_t guest_cluster) {
    Mapping mapping;
    image->state().mapper.survey({guest_cluster}, std::span(&mapping, 1));
    return mapping.has_host() ? image->geometry().offset_of(mapping.host).value : 0;
}

std::unique_ptr<Compact> Rig::connect(std::uint64_t number) {
    return std::make_unique<Compact>(*image, ownership, gauges, number);
}

void run_plan(Compact &compact, std::uint64_t size) {
    for (const auto &planned : compact.plan({0}, size, all_of_it))
        if (planned.to_do)
            compact.run(planned.at, planned.length, go_on);
}

int Rig::compact(const std::function<void()> &between) {
    constexpr int most_passes = 20;
    const auto connection = connect();
    const std::uint64_t piece = 8 * cluster();
    for (int pass = 1; pass <= most_passes; ++pass) {
        bool any = false;
        for (const auto &planned : connection->plan({0}, image->size(), all_of_it))
            for (std::uint64_t done = 0; planned.to_do && done < planned.length; done += piece) {
                connection->run(planned.at + done, std::min(piece, planned.length - done), go_on);
                any = true;
                if (between)
                    between();
            }
        connection->commit(go_on);
        if (!any && gauges.pending == 0)
            return pass;
    }
    return 0;
}

void Rig::crash_and_reopen() {
    image.reset();
    image = open_image(disk, false, cache_bytes_);
}

void Rig::finish() {
    CHECK(reads_right());
    image->close();
    image.reset();
    const Bytes bytes = disk->bytes();
    const Verdict verdict = judge(bytes);
    INFO(verdict.text());
    CHECK(verdict.clean());
    const QemuVerdict qemu = ask_qemu(bytes);
    INFO(qemu.output);
    CHECK((!qemu.available || qemu.status == 0));
    // In parentheses: a test that fails is not to print the disk.
    CHECK((guest_bytes(bytes) == model));
    const auto again = open_image(std::make_shared<FaultyDisk>(bytes), true);
    CHECK((read_all(*again) == model));
}

PunchGuard::PunchGuard(std::shared_ptr<FaultyDisk> disk) : disk_(std::move(disk)) {
    hook_ = disk_->add_hook(true, [this](const Request &r) {
        if (r.op != Op::punch && r.op != Op::truncate)
            return;
        const Bytes before = disk_->bytes();
        if (r.op == Op::truncate && r.at >= before.size())
            return;
        ++seen_;
        Bytes after = before;
        if (r.op == Op::truncate)
            after.resize(r.at);
        else
            std::fill(after.begin() + static_cast<std::ptrdiff_t>(r.at),
                      after.begin() +
                          static_cast<std::ptrdiff_t>(std::min<std::uint64_t>(r.at + r.length, after.size())),
                      std::byte{0});
        const Verdict verdict = judge(after);
        if (verdict.sound() && guest_bytes(before) == guest_bytes(after))
            return;
        const std::lock_guard guard(mutex_);
        wrong_ += fmt::format("{} at {:#x} of {} bytes takes what is in use; {}\n", name_of(r.op), r.at, r.length,
                              verdict.text());
    });
}

std::string PunchGuard::text() const {
    const std::lock_guard guard(mutex_);
    return wrong_;
}

Requests::Requests(std::shared_ptr<FaultyDisk> disk, Filter select) : disk_(std::move(disk)) {
    hook_ = disk_->add_hook(true, [this, select = std::move(select)](const Request &r) {
        if (!select(r))
            return;
        const std::lock_guard guard(mutex_);
        seen_.push_back(r);
    });
}

std::vector<Request> Requests::seen() const {
    const std::lock_guard guard(mutex_);
    return seen_;
}

std::string said(const std::function<void()> &request) {
    try {
        request();
    } catch (const Error &error) {
        return error.what();
    }
    return {};
}

void refused(const Bytes &bytes, const std::string &word) {
    const auto disk = std::make_shared<FaultyDisk>(bytes);
    const std::string sentence = said([&] { open_image(disk); });
    INFO(sentence);
    CHECK(sentence.find(word) != std::string::npos);
    CHECK(sentence.find('\n') == std::string::npos);
    CHECK((disk->bytes() == bytes));
}

} // namespace qlean::fault
