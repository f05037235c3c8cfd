// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// An export that is a page of text of fixed size, since a client caches an export's size. A read of its first byte
// makes the page anew; reads at other offsets of the same connection continue it.
#pragma once

#include "exports.h"
#include "lib/thread_safety.h"

namespace qlean::plugin {

constexpr std::size_t page_size = 65536;

/// The text with spaces after it, and a newline at the end of the page. It must be shorter than the page.
inline std::string padded(std::string text) {
    text.resize(page_size - 1, ' ');
    text += '\n';
    return text;
}

class PageExport : public Export {
  public:
    std::uint64_t size() const override { return page_size; }
    Abilities abilities() const override { return {}; }
    bool survives_resize() const override { return true; }
    void read(std::span<std::byte> into, std::uint64_t at) final {
        const Lock guard(mutex_);
        if (at == 0 || page_.empty())
            page_ = make();
        std::memcpy(into.data(), page_.data() + at, into.size());
    }
    void flush() override {}

  protected:
    /// `page_size` bytes. One at a time.
    virtual std::string make() = 0;
    /// What reads show from now on; make() is not running meanwhile.
    template <class F>
    void remake(F &&f) {
        const Lock guard(mutex_);
        page_ = f();
    }

  private:
    Mutex mutex_;
    std::string page_ PROTECTED_BY(mutex_);
};

} // namespace qlean::plugin
