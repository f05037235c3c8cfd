// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Turns SIGINT, SIGTERM and SIGHUP into a wish to stop that the main loop notices; the handler itself only sets a flag
// and writes one byte. The second signal no longer waits for the server: it removes the registered files and dies. So
// does the first one of a command that has nothing to finish, and of one that has not begun.
#pragma once

#include <chrono>
#include <optional>
#include <string>

namespace qlean::signals {

// Call once, before any connection exists. A SIGHUP or SIGQUIT that was ignored stays ignored (nohup; a script's `&`).
void install();

// Nothing has begun on the server: until begin() the first signal, too, ends the program, as stopped, whatever it waits
// for; and so does the time limit, if there is one. Not for a private server, which is to close its image first.
void not_begun(std::optional<std::chrono::milliseconds> limit = {});
void begin();

// For who registers files: after this every such signal, and SIGQUIT, removes them. Changes nothing after install().
void install_removal();

bool stop_requested();

// "SIGINT", or an empty string while nobody asked to stop.
std::string reason();

// Readable from the first signal on; for poll(). -1 before install().
int wake_fd();

// What a second signal must not leave behind: a socket and the directory that holds it. Empty strings forget it.
void set_leftovers(const std::string &socket_path, const std::string &directory);

} // namespace qlean::signals
