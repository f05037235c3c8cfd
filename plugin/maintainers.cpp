// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "maintainers.h"

#include "lib/error.h"
#include "nbdkit.h"

#include <algorithm>
#include <charconv>
#include <fmt/format.h>
#include <pwd.h>
#include <stdexcept>

namespace qlean::plugin {

namespace {

uid_t user(const std::string &text) {
    uid_t number = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
    if (error == std::errc{} && end == text.data() + text.size() && number != static_cast<uid_t>(-1))
        return number;
    const passwd *entry = text.empty() ? nullptr : ::getpwnam(text.c_str()); // one thread: nothing is served yet
    if (entry == nullptr)
        throw std::runtime_error(fmt::format("maintenance: there is no user '{}'; give yes, no, or the names or "
                                             "numbers of users with commas between",
                                             text));
    return entry->pw_uid;
}

} // namespace

Maintainers::Maintainers(const std::string &text) : everybody_(text == "yes") {
    if (text == "yes" || text == "no")
        return;
    for (std::size_t at = 0; at <= text.size();) {
        const std::size_t end = std::min(text.find(',', at), text.size());
        users_.push_back(user(text.substr(at, end - at)));
        at = end + 1;
    }
}

bool Maintainers::include_peer() const {
    if (everybody_ || users_.empty())
        return everybody_;
    const std::int64_t peer = nbdkit_peer_uid();
    return peer >= 0 && std::find(users_.begin(), users_.end(), static_cast<uid_t>(peer)) != users_.end();
}

void Maintainers::require_peer(const std::string &export_name) const {
    if (!include_peer())
        throw Error(Error::Kind::denied, EPERM,
                    fmt::format("export '{}' is not for this client (maintenance=)", export_name));
}

} // namespace qlean::plugin
