// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "pending_words.h"

#include "byte_order.h"

#include <stdexcept>

namespace qlean {

void PendingWords::store(HostOffset at, std::uint64_t word) {
    const Lock guard(mutex_);
    words_[at] = {word, syncs_.needs(), ++stamp_};
    count_.store(words_.size(), std::memory_order_release);
}

void PendingWords::read(HostOffset at, std::span<std::uint64_t> out) {
    // Asked before the file is read: what is no longer pending by then has reached the file.
    std::vector<std::pair<std::size_t, std::uint64_t>> newer;
    if (any()) {
        const Lock guard(mutex_);
        const HostOffset end = at + out.size() * 8;
        for (auto it = words_.lower_bound(at); it != words_.end() && it->first < end; ++it)
            newer.emplace_back((it->first - at) / 8, it->second.word);
    }
    file_.read(std::as_writable_bytes(out), at);
    for (auto &word : out)
        word = big_endian(word);
    for (const auto &[i, word] : newer)
        out[i] = word;
}

bool PendingWords::any_in(HostOffset at, std::uint64_t length) const {
    if (!any())
        return false;
    const Lock guard(mutex_);
    const auto first = words_.lower_bound(at);
    return first != words_.end() && first->first < at + length;
}

std::vector<PendingWords::Copy> PendingWords::take() const {
    std::vector<Copy> copies;
    if (!any())
        return copies;
    const Lock guard(mutex_);
    for (const auto &[at, word] : words_)
        copies.push_back({at, word.word, word.needs, word.stamp});
    return copies;
}

bool PendingWords::write(const std::vector<Copy> &copies) {
    std::vector<std::uint64_t> words;
    for (std::size_t i = 0; i < copies.size();) {
        const HostOffset at = copies[i].at;
        words.clear();
        // Adjacent words go out in one write.
        for (; i < copies.size() && copies[i].at == at + words.size() * 8; ++i) {
            if (!syncs_.is_durable(copies[i].needs))
                throw std::logic_error("a snapshot's entry would be published before what it points to is durable");
            words.push_back(big_endian(copies[i].word));
        }
        file_.write(std::as_bytes(std::span(words)), at);
    }
    return !copies.empty();
}

void PendingWords::done(const std::vector<Copy> &copies) {
    if (copies.empty())
        return;
    const Lock guard(mutex_);
    for (const Copy &copy : copies)
        if (const auto found = words_.find(copy.at); found != words_.end() && found->second.stamp == copy.stamp)
            words_.erase(found);
    count_.store(words_.size(), std::memory_order_release);
}

} // namespace qlean
