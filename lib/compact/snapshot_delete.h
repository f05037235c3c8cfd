// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Deleting an internal snapshot of an image in use: what only it held becomes free.
//
// Refcounts are compared with all references first. Then, in an order that a power cut cannot hurt: the snapshot goes
// from the table (a new table, switched to by the header in one write), durably; from then on nothing durable refers to
// what it had, and a crash leaves leaks at worst. Each of its references is then retired, as a guest's are that
// overwrites something, and so lowered and freed by a commit. Last, entries of the active image whose cluster or table
// nobody else has any more get their COPIED flag: until then they are copied before they change, which costs, but harms
// nothing; the flag too early would.
#pragma once

#include "maintenance.h"

namespace qlean {

/// The whole disk is one range to do, until it is done.
class SnapshotDelete final : public Maintenance {
  public:
    /// Throws Error if there is no such snapshot.
    SnapshotDelete(Image &image, MoveOwnership &ownership, std::uint64_t connection, const std::string &name_or_id);
    ~SnapshotDelete() override;

    std::vector<Planned> plan(GuestOffset at, std::uint64_t length, std::size_t most,
                              const StopCheck &stop = never) override;
    void run(GuestOffset at, std::uint64_t length, const StopCheck &stop) override;
    void commit(const StopCheck &stop) override;

  private:
    void verify(const StopCheck &stop);
    void remove_from_table();
    void switch_table();
    void retire_references(const StopCheck &stop);

    Image &image_;
    State &state_;
    MoveOwnership &ownership_;
    const std::uint64_t connection_;
    const std::string name_ = "snapshot-delete";
    std::mutex mutex_; // one request at a time
    const SnapshotPointer snapshot_;
    std::atomic<bool> deleted_{false};
};

/// Sets COPIED in the active image where a count of one says that it may be: after references were lowered. Needs no
/// lock, and no commit under way is disturbed. Throws Error (stopped) when `stop` says so; the rest lacks it then.
void set_copied_flags(State &state, const StopCheck &stop);

} // namespace qlean
