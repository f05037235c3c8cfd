// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// What a repair does, step by step, to a file that nobody uses. The order keeps every state that a crash can leave at
// most as damaged as the image was: flags that promise "refcount one" wrongly go first, and counts that are too low are
// raised with them; then counts that are too high are lowered; then the flags that may be set are set.
//
// Nothing is written into a place that something else refers to. New structures go to the end of the file, and never
// where something points already: that becomes part of the file first, and reads as zeroes. What refers to another
// wrong place stays as it is: nobody knows the right one.
#pragma once

#include "../header_home.h"
#include "checker.h"

#include <functional>
#include <map>

namespace qlean {

void write_words(File &file, std::vector<std::uint64_t> words, HostOffset at);
/// Durable when it returns.
void change_header(File &file, const std::function<void(Header &)> &change);

/// A check, and what is to be done about what it found.
class Mender {
  public:
    Mender(File &file, const StopCheck &stop);

    /// Makes counts and flags right.
    void everything();
    /// Lowers counts that are too high.
    void leaks();

    // What has to go before; after each the file has to be checked again. True: there was something to do.

    /// Entries whose meaning is lost although they hold nothing become zeroes, as QEMU does it.
    bool mend_entries();
    /// Tables in places that something else refers to as well get places of their own, so that their flags can be
    /// mended; whoever else uses the old place keeps what is there.
    bool separate();
    /// If refcount structures have to be made anew: what is referred to beyond the end becomes part of the file.
    bool take_in();

  private:
    enum class Flag { clear, set };
    enum class Count { raise, lower };

    std::uint64_t wanted(std::uint64_t c, std::uint64_t stored) const;
    std::uint64_t final_count(HostCluster c);
    HostCluster first_new() const;
    void count_new_places(HostRun run);
    void mend_counts(Count how);
    void mend_flags(Flag how);
    std::optional<std::uint64_t> count_by_flag(HostCluster c);
    static bool mend_flag(std::uint64_t &word, std::optional<std::uint64_t> count, Flag how);
    void forget_old_structures();
    void rebuild_refcounts();
    bool may_write(const Checker::Table &table) const;
    bool may_write_l1() const;

    File &file_;
    const Header header_;
    const Geometry geometry_;
    FileSource source_;

  public:
    Checker checker;

  private:
    const StopCheck &stop_;
    /// How often the refcount structures that are to go refer to a cluster.
    std::map<std::uint64_t, std::uint64_t> old_;
    std::uint64_t cached_region_ = ~std::uint64_t{0};
    std::optional<std::vector<std::byte>> cached_;
};

} // namespace qlean
