// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// From the record of a FaultyDisk to the images that a power cut, or a killed process, could have left.
//
// At a cut everything that took effect before the start of the last sync that succeeded is certain. Of the rest each
// sector has any prefix of the changes made to it, chosen independently: so any subset of the writes, torn at 512
// bytes, overlapping ones in order, and a punch or truncation before or after its neighbours. The file's length has any
// prefix of its own changes. After a sync that failed, what it should have covered stays uncertain for ever.
#pragma once

#include "tests/fault/faulty_file.h"

#include <random>

namespace qlean::fault {

/// Whether an uncertain change reached the disk, and of a torn write which sectors.
struct Fate {
    bool reached = false;
    std::vector<bool> sectors; ///< empty: all of them
};

class PowerCuts {
  public:
    explicit PowerCuts(const FaultyDisk &disk);

    std::size_t moments() const { return events_.size() + 1; }
    /// Goes on to the moment after the first `cut` events; ascending.
    void move_to(std::size_t cut);
    std::size_t moment() const { return cut_; }
    /// The changes that may or may not have reached the disk.
    const std::vector<const Event *> &uncertain() const { return uncertain_; }

    /// The image when each of them had this fate.
    Bytes image(const std::vector<Fate> &fates) const;
    /// The image that a process killed at this moment leaves: everything it did, nothing it had not done yet.
    Bytes image_of_killed() const;

  private:
    std::vector<std::size_t> certain_until_; // by moment: index of the first uncertain event
    const std::vector<Event> &events_;
    std::size_t cut_ = 0, applied_ = 0;
    Bytes base_;
    std::vector<const Event *> uncertain_;
};

/// Bit i of `number`: change i reached the disk.
std::vector<Fate> numbered_fates(const PowerCuts &cuts, std::uint64_t number);
/// One of many shapes: one change missing, one alone, the later ones, file system operations early or late, torn, …
std::vector<Fate> random_fates(const PowerCuts &cuts, std::mt19937_64 &random);

} // namespace qlean::fault
