// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// An nbdkit of our own for the time of one command, serving one image file on a socket nobody else can reach.
// Invariant: while this object lives the server is our child in its own process group (the terminal's Ctrl-C does not
// reach it, so we can drain first); it dies with us whatever kills us, and nothing of it is left on disk afterwards.
#pragma once

#include <string>
#include <sys/types.h>
#include <vector>

namespace qlean {

enum class Access { read_only, read_write };

// How an nbdkit is started.
struct Nbdkit {
    std::string program = "nbdkit";
    std::string passphrase_file; // of an encrypted image; empty: none
    std::string data_file;       // empty: where the image says

    // The plugin's parameters for this image.
    std::vector<std::string> parameters(const std::string &image) const;
};

class PrivateServer {
  public:
    // Returns when the socket accepts connections; throws with nbdkit's own words when it does not start.
    PrivateServer(const std::string &image, Access access, const Nbdkit &nbdkit,
                  const std::vector<std::string> &parameters);
    ~PrivateServer();
    PrivateServer(const PrivateServer &) = delete;
    PrivateServer &operator=(const PrivateServer &) = delete;

    const std::string &socket_path() const { return socket_; }

    // Stops the server and waits until it has closed the image. Throws if it reports that it failed to.
    void stop();

    // The last error nbdkit printed, without its prefixes; empty if there was none.
    std::string last_words() const;

  private:
    void start(const std::string &image, Access access, const Nbdkit &nbdkit,
               const std::vector<std::string> &parameters);
    void wait_until_listening(const std::string &image);
    void close_files() noexcept;
    int terminate() noexcept; // wait status, or -1 when there is no child
    void remove_directory() noexcept;

    std::string directory_;
    std::string socket_;
    pid_t child_ = -1;
    int ready_ = -1; // pipe that the child writes to when it is
    int log_ = -1;   // memfd that is the child's stderr: never blocks it, never needs a reader
};

} // namespace qlean
