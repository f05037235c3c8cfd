// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Moving compressed extents. An extent is never moved with its host cluster, which it shares with others: its exact
// bytes are written to another place, packed closely after those that were moved before it, and whoever refers to it,
// the active image and snapshots, gives up the references on the old place. A pack comes free when the last extent has
// left it.
//
// Where extents go to is a stretch: adjacent host clusters that were free, filled from the first byte on. While its
// current cluster takes more, the stretch holds a reference of its own on it, so that it cannot come free under it; the
// last extent that fits in there takes that reference over. So no refcount is ever below what refers, nor above what
// its width can say.
#pragma once

#include "../image.h"

namespace qlean {

class Repacker {
  public:
    explicit Repacker(Image &image) : image_(image), state_(image.state()), before_close_(image, [this] { close(); }) {}

    enum class Outcome {
        moved,
        contended, ///< the guest is using it: come back later
        gone,      ///< its entry is another one now: nothing to do
        no_room,   ///< no place for it at the site, and no way to make one
    };
    /// Where extents are to go: free clusters below `end`, or if there are none, below `limit`.
    struct Site {
        HostCluster end, limit;
    };
    /// Moves guest cluster `c`, whose descriptor is `descriptor`, to the site; if it must, beyond the end of what is
    /// used, to make a beginning. May commit; no lock held.
    Outcome move(GuestCluster c, std::uint64_t descriptor, const Site &site);

    /// `c` was filled by this object: nothing is gained by emptying it.
    bool filled(HostCluster c) const;
    /// Gives back what was reserved and not used. False: there was nothing.
    bool close();

  private:
    struct Stretch {
        Allocator::Reservation clusters; ///< from the current one on
        HostOffset at, end;              ///< the next free byte, and where the stretch ends
        std::uint64_t references = 0;    ///< of extents on the current cluster
    };
    struct Place {
        HostOffset at;
        std::vector<HostRun> clusters; ///< with all the references that were asked for
    };

    /// For an extent that has this many `referrers`.
    std::optional<Place> place(std::uint64_t bytes, std::uint64_t referrers, const Site &site);
    HostOffset next(const Stretch &stretch, std::uint64_t referrers) const;
    bool extend_stretch(std::uint64_t bytes, std::uint64_t referrers, const Site &site) WITH_LOCK(mutex_);
    bool open_stretch(std::uint64_t bytes, const Site &site) WITH_LOCK(mutex_);
    bool open_below(HostCluster limit, std::uint64_t least, std::uint64_t most) WITH_LOCK(mutex_);
    void begin_stretch(Allocator::Reservation clusters) WITH_LOCK(mutex_);
    void will_fill(HostCluster first, HostCluster end) WITH_LOCK(mutex_);
    Place take(Stretch &stretch, std::uint64_t bytes, std::uint64_t referrers);

    Image &image_;
    State &state_;
    mutable Mutex mutex_; // held while committing to make room
    std::vector<Stretch> stretches_ PROTECTED_BY(mutex_);
    std::vector<bool> filled_ PROTECTED_BY(mutex_);
    std::uint64_t grown_ PROTECTED_BY(mutex_) = 0; ///< clusters taken beyond the site, to make a beginning
    Image::BeforeClose before_close_;              ///< what is reserved is a leak otherwise
};

} // namespace qlean
