// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// fork, exec, wait for the process id, SIGTERM, wait. nbdkit writes its process id when it is ready to be connected to;
// the file that we name for that is a pipe. (Not a connection to see whether it accepts one: 1.32 crashes if it is to
// end while one is beginning.) The directory of the socket is 0700, which is what keeps other users away from it:
// nbdkit creates the socket itself with its own umask.
#include "private_server.h"

#include "failure.h"
#include "paths.h"
#include "signals.h"

#include <fmt/format.h>

#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>
#include <vector>

namespace qlean {

namespace {

constexpr int look_again_ms = 50; // whether the server has ended

std::string how_it_ended(int status) {
    return WIFSIGNALED(status) ? fmt::format("by signal {} ({})", WTERMSIG(status), ::strsignal(WTERMSIG(status)))
                               : fmt::format("with exit status {}", WEXITSTATUS(status));
}

// Runs in the child. Only async-signal-safe calls: everything that allocates was done before the fork.
[[noreturn]] void become(char *const argv[], int log, int ready, pid_t parent) {
    ::fcntl(ready, F_SETFD, 0);
    ::setpgid(0, 0);
    ::prctl(PR_SET_PDEATHSIG, SIGTERM);
    if (::getppid() != parent) {
        ::_exit(1); // the parent died before the line above
    }
    for (const int number : {SIGINT, SIGTERM, SIGHUP, SIGPIPE}) {
        ::signal(number, SIG_DFL);
    }
    ::dup2(log, STDERR_FILENO);
    ::dup2(log, STDOUT_FILENO);
    ::execvp(argv[0], argv);
    const char *text = std::strerror(errno);
    [[maybe_unused]] auto n = ::write(STDERR_FILENO, "error: cannot be started: ", 26);
    n = ::write(STDERR_FILENO, text, std::strlen(text));
    ::_exit(127);
}

} // namespace

std::vector<std::string> Nbdkit::parameters(const std::string &image) const {
    std::vector<std::string> words = {"file=" + absolute_path(image)};
    if (!passphrase_file.empty()) {
        words.push_back("passphrase=+" + absolute_path(passphrase_file));
    }
    if (!data_file.empty()) {
        words.push_back("data-file=" + absolute_path(data_file));
    }
    return words;
}

PrivateServer::PrivateServer(const std::string &image, Access access, const Nbdkit &nbdkit,
                             const std::vector<std::string> &parameters) {
    try {
        start(image, access, nbdkit, parameters);
        wait_until_listening(image);
    } catch (...) {
        terminate();
        remove_directory();
        close_files();
        throw;
    }
}

PrivateServer::~PrivateServer() {
    terminate();
    remove_directory();
    close_files();
}

void PrivateServer::close_files() noexcept {
    for (const int fd : {log_, ready_}) {
        if (fd != -1) {
            ::close(fd);
        }
    }
}

void PrivateServer::start(const std::string &image, Access access, const Nbdkit &nbdkit,
                          const std::vector<std::string> &parameters) {
    const char *base = std::getenv("TMPDIR");
    std::string name = fmt::format("{}/qlean-XXXXXX", base != nullptr && *base == '/' ? base : "/tmp");
    // A socket's path is limited to 107 bytes; a long TMPDIR must not make us fail.
    if (name.size() + sizeof "/sock" >= sizeof(sockaddr_un::sun_path)) {
        name = "/tmp/qlean-XXXXXX";
    }
    if (::mkdtemp(name.data()) == nullptr) {
        throw Failure(
            fmt::format("cannot create a private directory {} for the socket: {}", name, std::strerror(errno)));
    }
    directory_ = name;
    socket_ = directory_ + "/sock";
    signals::set_leftovers(socket_, directory_);
    signals::install_removal();

    log_ = ::memfd_create("qlean-nbdkit-log", MFD_CLOEXEC);
    if (log_ == -1) {
        throw Failure(fmt::format("cannot create a buffer for the server's messages: {}", std::strerror(errno)));
    }

    int pipe[2];
    if (::pipe2(pipe, O_CLOEXEC) == -1) {
        throw Failure(fmt::format("cannot create a pipe to the server: {}", std::strerror(errno)));
    }
    ready_ = pipe[0];
    struct Closed { // here: the last one who has it is the server
        int fd;
        ~Closed() { ::close(fd); }
    } const theirs{pipe[1]};

    std::vector<std::string> words = {nbdkit.program, "-f",   "-P", fmt::format("/proc/self/fd/{}", theirs.fd),
                                      "-U",           socket_};
    if (access == Access::read_only) {
        words.emplace_back("-r");
    }
    words.push_back(plugin_module());
    for (auto &parameter : nbdkit.parameters(image)) {
        words.push_back(std::move(parameter));
    }
    words.insert(words.end(), parameters.begin(), parameters.end());
    std::vector<char *> argv;
    for (auto &word : words) {
        argv.push_back(word.data());
    }
    argv.push_back(nullptr);

    const pid_t parent = ::getpid();
    child_ = ::fork();
    if (child_ == -1) {
        throw Failure(fmt::format("cannot start {}: {}", nbdkit.program, std::strerror(errno)));
    }
    if (child_ == 0) {
        become(argv.data(), log_, theirs.fd, parent);
    }
    // Both sides do it, so the group exists before the terminal can send anything, whoever runs first.
    ::setpgid(child_, child_);
}

void PrivateServer::wait_until_listening(const std::string &image) {
    for (;;) {
        pollfd events[2] = {{ready_, POLLIN, 0}, {signals::wake_fd(), POLLIN, 0}};
        const bool heard = ::poll(events, 2, look_again_ms) > 0;
        if (heard && (events[0].revents & POLLIN) != 0) {
            return;
        }
        int status = 0;
        if (::waitpid(child_, &status, WNOHANG) == child_) {
            child_ = -1;
            const std::string words = last_words();
            throw Failure(words.empty() ? fmt::format("cannot serve {}: nbdkit ended without a word, {}", image,
                                                      how_it_ended(status))
                                        : fmt::format("cannot serve {}: nbdkit: {}", image, words));
        }
        if (signals::stop_requested()) // a repair that ends with it is finished by the next one
            throw Failure(fmt::format("stopped before {} was ready", image), ExitCode::stopped);
        if (heard) { // nobody has the pipe any more, and the server has not ended
            std::this_thread::sleep_for(std::chrono::milliseconds(look_again_ms));
        }
    }
}

int PrivateServer::terminate() noexcept {
    if (child_ == -1) {
        return -1;
    }
    ::kill(child_, SIGTERM);
    int status = 0;
    while (::waitpid(child_, &status, 0) == -1 && errno == EINTR) {
    }
    child_ = -1;
    return status;
}

void PrivateServer::stop() {
    const int status = terminate();
    remove_directory();
    if (status == -1 || (WIFEXITED(status) && WEXITSTATUS(status) == 0)) {
        return;
    }
    const std::string words = last_words();
    throw Failure(fmt::format("the private nbdkit did not close the image cleanly{}; run 'qemu-img check' on it",
                              words.empty() ? "" : ": " + words));
}

void PrivateServer::remove_directory() noexcept {
    if (!directory_.empty()) {
        ::unlink(socket_.c_str());
        ::rmdir(directory_.c_str());
        signals::set_leftovers("", "");
        directory_.clear();
    }
}

std::string PrivateServer::last_words() const {
    std::string text;
    char buffer[4096];
    off_t offset = 0;
    for (ssize_t n = 0; (n = ::pread(log_, buffer, sizeof buffer, offset)) > 0; offset += n) {
        text.append(buffer, static_cast<std::size_t>(n));
    }
    // nbdkit writes "nbdkit: PLUGIN[N]: error: TEXT"; the first error is the cause, later ones are consequences.
    constexpr std::string_view mark = "error: ";
    const auto at = text.find(mark);
    std::string line = at == std::string::npos ? text : text.substr(at + mark.size());
    line = line.substr(0, line.find('\n'));
    return line;
}

} // namespace qlean
