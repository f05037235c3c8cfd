// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// What the user named: a server to talk to, or an image for which a private server is started. After construction
// every kind is the same thing, a place connections can be made to.
#pragma once

#include "private_server.h"

#include <memory>
#include <string>
#include <vector>

struct nbd_handle;

namespace qlean {

class Target {
  public:
    // TEXT is an NBD URI, the path of a Unix socket, or an image file or block device.
    // PARAMETERS are for the plugin of a private server.
    Target(const std::string &text, Access access, const Nbdkit &nbdkit,
           const std::vector<std::string> &parameters = {});

    bool is_private() const { return server_ != nullptr; }

    // Connects up to the option negotiation (the handle must be in opt mode). Throws one sentence.
    void connect(nbd_handle *handle) const;

    const std::string &name() const { return name_; }

    // What a private server said about its end, as " (nbdkit: TEXT)"; empty otherwise.
    std::string server_words() const;

    // Stops the private server, if there is one, and reports its failures.
    void finish();

  private:
    std::string name_;
    std::string uri_; // exactly one of these two is set
    std::string socket_;
    std::unique_ptr<PrivateServer> server_;
};

} // namespace qlean
