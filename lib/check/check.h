// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Checking and repairing an image: a file that nobody uses, or beside the guest that uses it.
#pragma once

#include "../state.h"
#include "../stop.h"
#include "report.h"

namespace qlean {

/// Checks the image in `file`, which nobody is writing. Nothing is changed. Throws Error if it is no image that can be
/// checked.
CheckReport check_file(File &file, const StopCheck &stop = never);

/// Checks, mends, and checks again: the report is of what is left, and of what was fixed. Repair::leaks does nothing to
/// an image with corruptions: what looks leaked may be all that is left of something. Nobody else uses the file. After
/// a crash the image is as damaged as before, or less; but in version 2, which has no dirty bit, tables that were given
/// new places may lack a refcount there, if the refcount blocks were damaged too.
CheckReport repair_file(File &file, Repair how, const StopCheck &stop = never);

/// Checks beside the guest. Repair::leaks gives back what is counted and not referred to: the next commit that gives
/// back makes it free. Nobody else moves clusters meanwhile. No lock held.
CheckReport check_image(State &state, Repair how, const StopCheck &stop);

} // namespace qlean
