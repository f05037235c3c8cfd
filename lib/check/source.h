// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Where a check reads an image from: a file that nobody is using, or an image that serves a guest. All words in host
// byte order. The check trusts nothing of it, and shares no walk with the engine: it is the engine's judge.
#pragma once

#include "../byte_order.h"
#include "../file.h"
#include "../header.h"
#include "../l2_entry.h"

#include <span>
#include <vector>

namespace qlean {

inline void read_words(File &file, HostOffset at, std::span<std::uint64_t> words) {
    file.read(std::as_writable_bytes(words), at);
    for (std::uint64_t &word : words)
        word = big_endian(word);
}

class CheckSource {
  public:
    virtual ~CheckSource() = default;

    virtual Header header() = 0;
    /// For what has no method of its own.
    virtual File &file() = 0;
    /// Bytes of the file.
    virtual std::uint64_t length() = 0;

    /// Fewer entries than the header says: the others lie beyond the end of the file, and are 0.
    virtual std::vector<std::uint64_t> l1() = 0;
    virtual std::vector<std::uint64_t> refcount_table() = 0;
    /// A refcount block as it is stored.
    virtual void refcount_block(HostOffset at, std::span<std::byte> bytes) = 0;
    /// Table i of the active image, which l1() says is at `home`.
    virtual void l2(std::uint64_t i, HostOffset home, std::span<std::uint64_t> words) = 0;

    /// A guest is at work: an entry that seems wrong is read once more, and clusters may be touched.
    virtual bool live() const = 0;
    /// Entry n of table i, which nobody is changing while this reads.
    virtual L2Words l2_again(std::uint64_t i, std::uint64_t n) = 0;
    /// All references have been read. Returns when touched() knows what had been unlinked by then.
    virtual void all_read() = 0;
    /// Something has happened to this cluster since the check began, so it cannot be judged.
    virtual bool touched(HostCluster c) = 0;
};

/// A file that nobody is using.
class FileSource final : public CheckSource {
  public:
    FileSource(File &file, Header header) : file_(file), header_(std::move(header)), length_(file.length()) {}

    Header header() override { return header_; }
    File &file() override { return file_; }
    std::uint64_t length() override { return length_; }
    std::vector<std::uint64_t> l1() override { return words(header_.l1_offset, header_.l1_size); }
    std::vector<std::uint64_t> refcount_table() override {
        return words(header_.refcount_table_offset,
                     header_.geometry().bytes(header_.refcount_table_clusters) / sizeof(std::uint64_t));
    }
    void refcount_block(HostOffset at, std::span<std::byte> bytes) override { file_.read(bytes, at); }
    void l2(std::uint64_t, HostOffset home, std::span<std::uint64_t> words) override { read_words(file_, home, words); }
    bool live() const override { return false; }
    L2Words l2_again(std::uint64_t, std::uint64_t) override { return {}; }
    void all_read() override {}
    bool touched(HostCluster) override { return false; }

  private:
    /// Those in the file, however many the header claims.
    std::vector<std::uint64_t> words(HostOffset at, std::uint64_t count) {
        const std::uint64_t there = at.value < length_ ? divide_up(length_ - at.value, sizeof(std::uint64_t)) : 0;
        std::vector<std::uint64_t> found(std::min(count, there));
        read_words(file_, at, found);
        return found;
    }

    File &file_;
    const Header header_;
    const std::uint64_t length_;
};

} // namespace qlean
