// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// A URI is recognised by its scheme before the file system is asked, the rest by what stat() says.
#include "target.h"

#include "connection.h"
#include "failure.h"

#include <fmt/format.h>
#include <libnbd.h>

#include <cerrno>
#include <cstring>
#include <sys/stat.h>

namespace qlean {

Target::Target(const std::string &text, Access access, const Nbdkit &nbdkit, const std::vector<std::string> &parameters)
    : name_(text) {
    if (text.find("://") != std::string::npos) {
        if (text.rfind("nbd", 0) != 0) {
            throw Failure(
                fmt::format("'{}' is not an NBD URI: it must begin with nbd:, nbds:, nbd+unix: or nbds+unix:", text),
                ExitCode::usage);
        }
        uri_ = text;
        return;
    }
    struct stat info {};
    if (::stat(text.c_str(), &info) == -1) {
        throw Failure(fmt::format("cannot open '{}': {}", text, std::strerror(errno)));
    }
    if (S_ISSOCK(info.st_mode)) {
        socket_ = text;
    } else if (S_ISREG(info.st_mode) || S_ISBLK(info.st_mode)) {
        server_ = std::make_unique<PrivateServer>(text, access, nbdkit, parameters);
        socket_ = server_->socket_path();
    } else {
        throw Failure(fmt::format("'{}' is neither a socket nor an image file", text));
    }
}

void Target::connect(nbd_handle *handle) const {
    const int result =
        uri_.empty() ? ::nbd_connect_unix(handle, socket_.c_str()) : ::nbd_connect_uri(handle, uri_.c_str());
    if (result == -1) {
        throw Failure(fmt::format("cannot connect to {}: {}{}", name_, nbd_error_text(), server_words()));
    }
}

std::string Target::server_words() const {
    if (!server_) {
        return "";
    }
    const std::string words = server_->last_words();
    return words.empty() ? "" : fmt::format(" (nbdkit: {})", words);
}

void Target::finish() {
    if (server_) {
        server_->stop();
    }
}

} // namespace qlean
