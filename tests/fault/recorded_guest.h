// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// A guest that remembers what it did and what it was promised, on a disk that records: each change with the moment it
// began, each flush with the disk as it was and the moment it was acknowledged. After a power cut at any moment, every
// byte must be what it was at the last flush acknowledged before, or what a change that had begun by then made of it.
//
// One thread uses a guest. `moment` is a number of events of the FaultyDisk.
#pragma once

#include "lib/image.h"
#include "tests/fault/faulty_file.h"

#include <random>

namespace qlean::fault {

class RecordedGuest {
  public:
    RecordedGuest(Image &image, FaultyDisk &disk, std::uint64_t seed);

    void write(std::uint64_t at, std::uint64_t length);
    void trim(std::uint64_t at, std::uint64_t length);
    void zero(std::uint64_t at, std::uint64_t length, Image::Zero how);
    void flush();
    /// Reads a range and compares: throws std::runtime_error.
    void check(std::uint64_t at, std::uint64_t length);

    struct Mix {
        unsigned write = 60, trim = 15, zero = 15, flush = 10, check = 0;
        std::uint64_t most = 8192;                        ///< bytes of one request
        std::uint64_t first = 0, end = ~std::uint64_t{0}; ///< the part of the disk that is used
    };
    void step(const Mix &mix);

    const Bytes &now() const { return model_; }
    std::mt19937_64 &random() { return random_; }
    /// The requests that failed since the beginning left their range in one of several states; step() and the members
    /// above let the exception through, and this takes both as allowed from now on.
    void forgive_failures(bool forgive) { forgiving_ = forgive; }

    /// Nothing, or what is wrong with a disk found after a cut at `moment`.
    std::optional<std::string> verdict(const Bytes &disk, std::size_t moment) const;

  private:
    enum class Kind : std::uint8_t { write, zero, trim };
    struct Change {
        Kind kind;
        std::size_t began;
        std::uint64_t at, length, salt;
    };
    struct Promise {
        std::size_t since;   ///< moment
        std::size_t changes; ///< that it covers
        Bytes disk;
    };

    template <class F>
    void change(Kind kind, std::uint64_t at, std::uint64_t length, F &&request);
    static std::byte value(const Change &change, std::uint64_t at);

    Image &image_;
    FaultyDisk &disk_;
    std::mt19937_64 random_;
    Bytes model_;
    bool forgiving_ = false;
    std::vector<Change> changes_;
    std::vector<Promise> promises_;
};

} // namespace qlean::fault
