// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Bytes that must not outlive their use: a passphrase, a key. Wiped when the object dies or is moved from; never
// copied.
#pragma once

#include <cstddef>
#include <cstring>
#include <memory>
#include <span>
#include <string_view>
#include <utility>

namespace qlean {

class Secret {
  public:
    Secret() = default;
    explicit Secret(std::size_t size) : bytes_(std::make_unique<std::byte[]>(size)), size_(size) {}
    explicit Secret(std::string_view text) : Secret(text.size()) {
        if (!text.empty())
            std::memcpy(bytes_.get(), text.data(), text.size());
    }
    Secret(Secret &&other) noexcept : bytes_(std::move(other.bytes_)), size_(std::exchange(other.size_, 0)) {}
    Secret &operator=(Secret &&other) noexcept {
        std::swap(bytes_, other.bytes_);
        std::swap(size_, other.size_);
        return *this;
    }
    ~Secret() {
        if (bytes_)
            ::explicit_bzero(bytes_.get(), size_);
    }

    bool empty() const { return size_ == 0; }
    std::size_t size() const { return size_; }
    std::span<std::byte> bytes() { return {bytes_.get(), size_}; }
    std::span<const std::byte> bytes() const { return {bytes_.get(), size_}; }

  private:
    std::unique_ptr<std::byte[]> bytes_;
    std::size_t size_ = 0;
};

} // namespace qlean
