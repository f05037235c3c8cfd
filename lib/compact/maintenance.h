// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// What every maintenance operation is: a plan over the guest's disk, doing a part of it, committing what was done.
// One object per connection. Offsets and lengths are guest bytes inside the disk.
#pragma once

#include "../error.h"
#include "../image.h"
#include "../thread_safety.h"
#include "survey.h"

#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace qlean {

class Maintenance {
  public:
    struct Planned {
        GuestOffset at;
        std::uint64_t length;
        bool to_do;
    };

    virtual ~Maintenance() = default;

    /// The range as alternating runs of "to do" and "nothing to do", at most `most` of them. Changes nothing.
    virtual std::vector<Planned> plan(GuestOffset at, std::uint64_t length, std::size_t most,
                                      const StopCheck &stop = never) = 0;
    /// Does what the plan says of the range. May do less and return (contended, no room): the plan tells. Throws Error
    /// (busy) if another connection owns the operation, Error (stopped) when `stop` says so.
    virtual void run(GuestOffset at, std::uint64_t length, const StopCheck &stop) = 0;
    /// Makes what is finished durable, then gives back the space, then shortens the file.
    virtual void commit(const StopCheck &stop) = 0;
};

/// Which connection owns the operations that move clusters; there is one owner at most.
class MoveOwnership {
  public:
    struct Owner {
        std::string operation;
        std::uint64_t connection;
    };

    /// Makes `connection` the owner, or throws Error (busy) that says who is.
    void claim(const std::string &operation, std::uint64_t connection) {
        const Lock guard(mutex_);
        if (owner_ && owner_->connection != connection)
            throw Error(Error::Kind::busy, EPERM,
                        fmt::format("connection {} is running '{}' on this image; wait until it has finished",
                                    owner_->connection, owner_->operation));
        owner_ = Owner{operation, connection};
    }
    void release(std::uint64_t connection) {
        const Lock guard(mutex_);
        if (owner_ && owner_->connection == connection)
            owner_.reset();
    }
    std::optional<Owner> owner() const {
        const Lock guard(mutex_);
        return owner_;
    }

  private:
    mutable Mutex mutex_;
    std::optional<Owner> owner_ PROTECTED_BY(mutex_);
};

/// Appends to a plan, joining equal neighbours.
inline void append_planned(std::vector<Maintenance::Planned> &plan, GuestOffset at, std::uint64_t length, bool to_do) {
    if (!plan.empty() && plan.back().to_do == to_do)
        plan.back().length += length;
    else if (length > 0)
        plan.push_back({at, length, to_do});
}

} // namespace qlean
