// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// `qlean serve`: prepares a socket path, prints how to attach a guest, and becomes nbdkit. The process that the service
// manager started stays the server: no wrapper is left between a signal and nbdkit.
#include "options.h"
#include "paths.h"

#include <fmt/format.h>

#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

namespace qlean {

namespace {

// Removes a socket nobody listens on; refuses to touch anything else.
void make_way(const std::string &path) {
    sockaddr_un address{};
    if (path.size() >= sizeof address.sun_path) {
        throw Failure(
            fmt::format("the socket path {} is longer than the {} bytes a Unix socket allows; choose one with "
                        "--socket",
                        path, sizeof address.sun_path - 1));
    }
    struct stat info {};
    if (::lstat(path.c_str(), &info) == -1) {
        return; // nbdkit explains any real problem better than we could
    }
    if (!S_ISSOCK(info.st_mode)) {
        throw Failure(fmt::format("{} exists and is not a socket; choose another path with --socket", path));
    }
    const int fd = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
    const int result = ::connect(fd, reinterpret_cast<sockaddr *>(&address), sizeof address);
    const int error = result == 0 ? 0 : errno;
    ::close(fd);
    if (error == 0) {
        throw Failure(
            fmt::format("a server is already listening on {}; stop it, or choose another path with --socket", path),
            ExitCode::busy);
    }
    if (error != ECONNREFUSED) {
        throw Failure(fmt::format("cannot tell whether a server is listening on {}: {}", path, std::strerror(error)));
    }
    if (::unlink(path.c_str()) == -1) {
        throw Failure(fmt::format("cannot remove the stale socket {}: {}", path, std::strerror(errno)));
    }
    tell(fmt::format("qlean: removed the stale socket {}", path));
}

// A filter only loads into the very nbdkit it was built for; asking nbdkit is the only reliable test. Returns what it
// said when it refused, or nothing when the filter loads.
std::string why_filter_fails(const std::string &nbdkit, const std::string &filter, const std::string &plugin) {
    std::array<int, 2> ends{};
    if (::pipe(ends.data()) == -1) {
        return std::strerror(errno);
    }
    const std::string option = "--filter=" + filter;
    const pid_t child = ::fork();
    if (child == -1) {
        ::close(ends[0]);
        ::close(ends[1]);
        return std::strerror(errno);
    }
    if (child == 0) {
        ::dup2(ends[1], STDERR_FILENO);
        ::dup2(ends[1], STDOUT_FILENO);
        ::close(ends[0]);
        ::close(ends[1]);
        ::execlp(nbdkit.c_str(), nbdkit.c_str(), option.c_str(), plugin.c_str(), "--dump-plugin", nullptr);
        ::_exit(127);
    }
    ::close(ends[1]);
    std::string text;
    std::array<char, 4096> buffer{};
    for (ssize_t n = 0; (n = ::read(ends[0], buffer.data(), buffer.size())) > 0;) {
        text.append(buffer.data(), static_cast<std::size_t>(n));
    }
    ::close(ends[0]);
    int status = 0;
    ::waitpid(child, &status, 0);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0) {
        return "";
    }
    if (WIFEXITED(status) && WEXITSTATUS(status) == 127) {
        throw Failure(fmt::format("cannot run '{}'; install nbdkit, or name it with --nbdkit", nbdkit));
    }
    text = text.substr(0, text.find('\n'));
    return text.empty() ? "it does not load" : text;
}

std::string xml_escape(const std::string &text) {
    std::string out;
    for (const char c : text) {
        switch (c) {
        case '&':
            out += "&amp;";
            break;
        case '<':
            out += "&lt;";
            break;
        case '>':
            out += "&gt;";
            break;
        case '\'':
            out += "&apos;";
            break;
        default:
            out += c;
        }
    }
    return out;
}

void print_disk(const std::string &socket, bool read_only) {
    fmt::print(
        "<!-- libvirt 11.3 or newer: put <reconnect delay='30'/> into <source>, and the guest survives a restart "
        "of this server -->\n"
        "<disk type='network' device='disk'>\n"
        "  <driver name='qemu' type='raw' cache='none' discard='unmap' detect_zeroes='unmap' "
        "error_policy='stop'/>\n"
        "  <source protocol='nbd'>\n"
        "    <host transport='unix' socket='{}'/>\n"
        "  </source>\n"
        "  <target dev='vda' bus='virtio'/>\n{}"
        "</disk>\n",
        xml_escape(socket), read_only ? "  <readonly/>\n" : "");
    std::fflush(stdout);
}

} // namespace

ExitCode run_serve(const ServeOptions &options) {
    if (::access(options.image.c_str(), F_OK) == -1) {
        throw Failure(fmt::format("cannot open '{}': {}", options.image, std::strerror(errno)));
    }
    const std::string image = absolute_path(options.image);
    const std::string socket = options.socket.empty() ? image + ".sock" : absolute_path(options.socket);
    make_way(socket);

    const std::string plugin = plugin_module();
    std::vector<std::string> words = {options.nbdkit.program, "-f", "-U", socket};
    if (options.threads) {
        words.insert(words.end(), {"-t", std::to_string(*options.threads)});
    }
    if (options.read_only) {
        words.emplace_back("-r");
    } else if (options.filter) {
        const std::string filter = filter_module();
        const std::string reason = why_filter_fails(options.nbdkit.program, filter, plugin);
        if (reason.empty()) {
            words.push_back("--filter=" + filter);
        } else {
            tell(fmt::format("qlean: serving without the reclaim filter: {}", reason));
        }
    }
    words.push_back(plugin);
    for (auto &parameter : options.nbdkit.parameters(image)) {
        words.push_back(std::move(parameter));
    }
    words.insert(words.end(), options.extra.begin(), options.extra.end());

    print_disk(socket, options.read_only);
    std::vector<char *> argv;
    for (auto &word : words) {
        argv.push_back(word.data());
    }
    argv.push_back(nullptr);
    ::execvp(argv[0], argv.data());
    throw Failure(fmt::format("cannot run '{}': {}; install nbdkit, or name it with --nbdkit", options.nbdkit.program,
                              std::strerror(errno)));
}

} // namespace qlean
