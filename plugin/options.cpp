// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "options.h"

#include "lib/error.h"
#include "nbdkit.h"

#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <vector>

namespace qlean::plugin {

namespace {

constexpr const char *short_options_with_argument = "DegipPtuU";

std::vector<std::string> command_line() {
    std::ifstream in("/proc/self/cmdline", std::ios::binary);
    const std::string all((std::istreambuf_iterator<char>(in)), {});
    std::vector<std::string> arguments;
    for (std::size_t at = 0; at < all.size();) {
        arguments.emplace_back(all.c_str() + at);
        at += arguments.back().size() + 1;
    }
    return arguments;
}

std::string absolute_path(const std::string &key, const std::string &value) {
    const std::unique_ptr<char, decltype(&std::free)> path(nbdkit_absolute_path(value.c_str()), &std::free);
    if (!path)
        throw Error(Error::Kind::unsupported, EINVAL, fmt::format("'{}={}' names no file", key, value));
    return path.get();
}

/// Never from the command line itself, which everybody on the machine can read.
std::shared_ptr<const Secret> read_passphrase(const std::string &value) {
    if (value.empty() || (value[0] != '+' && value[0] != '-'))
        throw Error(Error::Kind::unsupported, EINVAL,
                    "a passphrase on the command line can be read by everybody on this machine; give passphrase=+FILE "
                    "(a file that holds it), passphrase=-FD (an open file descriptor), or passphrase=- to be asked");
    char *text = nullptr;
    if (nbdkit_read_password(value.c_str(), &text) == -1)
        throw Error(Error::Kind::io, EINVAL, "the passphrase cannot be read (the reason is above)");
    auto secret = std::make_shared<const Secret>(std::string_view(text));
    ::explicit_bzero(text, std::strlen(text));
    std::free(text);
    return secret;
}

} // namespace

void Options::set(const std::string &key, const std::string &value) {
    if (key == "file") {
        file = absolute_path(key, value);
    } else if (key == "data-file") {
        data_file = absolute_path(key, value);
    } else if (key == "passphrase") {
        passphrase = read_passphrase(value);
    } else if (key == "metadata-cache") {
        const std::int64_t size = nbdkit_parse_size(value.c_str());
        if (size <= 0)
            throw Error(Error::Kind::unsupported, EINVAL,
                        fmt::format("'metadata-cache={}' is not a size such as 64M", value));
        cache_bytes = static_cast<std::uint64_t>(size);
    } else if (key == "repair") {
        if (value != "none" && value != "leaks" && value != "all")
            throw Error(Error::Kind::unsupported, EINVAL,
                        fmt::format("'repair={}' is not known; use none, leaks or all", value));
        repair = value == "none" ? Repair::none : value == "leaks" ? Repair::leaks : Repair::all;
    } else if (key == "maintenance") {
        maintainers = Maintainers(value);
    } else if (key == "check-only") {
        const int yes = nbdkit_parse_bool(value.c_str());
        if (yes == -1)
            throw Error(Error::Kind::unsupported, EINVAL, fmt::format("'check-only={}' is not yes or no", value));
        check_only = yes != 0;
    } else {
        throw Error(
            Error::Kind::unsupported, EINVAL,
            fmt::format(
                "unknown parameter '{}'; the qcow2 plugin takes file=, data-file=, passphrase=, metadata-cache=, "
                "repair=, maintenance= and check-only=",
                key));
    }
}

void Options::complete() {
    if (file.empty())
        throw Error(Error::Kind::unsupported, EINVAL, "which image? give file=DISK.qcow2");
    read_only = started_read_only();
    if (read_only && repair && *repair != Repair::none)
        throw Error(Error::Kind::unsupported, EINVAL, "a read-only server (-r) repairs nothing; leave out repair=");
}

bool started_read_only() {
    const auto arguments = command_line();
    for (std::size_t i = 1; i < arguments.size(); ++i) {
        const std::string &a = arguments[i];
        if (a == "--")
            break;
        if (a.rfind("--", 0) == 0) {
            if (a.size() >= 5 &&
                (std::string("--readonly").rfind(a, 0) == 0 || std::string("--read-only").rfind(a, 0) == 0))
                return true;
            continue;
        }
        if (a.size() < 2 || a[0] != '-')
            continue;
        for (std::size_t c = 1; c < a.size(); ++c) {
            if (a[c] == 'r')
                return true;
            if (std::strchr(short_options_with_argument, a[c]) != nullptr) {
                if (c + 1 == a.size())
                    ++i;
                break;
            }
        }
    }
    return false;
}

std::string running_nbdkit_version() {
    // A plugin is not told; the program says it when asked. "nbdkit 1.32.5 (nbdkit 1.32.5-1)" is the answer.
    std::error_code error;
    const auto program = std::filesystem::read_symlink("/proc/self/exe", error);
    std::string answer;
    if (!error) {
        const std::unique_ptr<FILE, int (*)(FILE *)> out(
            ::popen(fmt::format("'{}' --version 2>/dev/null </dev/null", program.string()).c_str(), "re"), &::pclose);
        char line[256];
        if (out && std::fgets(line, sizeof line, out.get()) != nullptr)
            answer = line;
    }
    std::string version;
    if (const auto at = answer.find("nbdkit "); at != std::string::npos)
        for (std::size_t i = at + 7;
             i < answer.size() && (std::isdigit(static_cast<unsigned char>(answer[i])) || answer[i] == '.'); ++i)
            version += answer[i];
    return version.empty() ? NBDKIT_VERSION_STRING : version;
}

} // namespace qlean::plugin
