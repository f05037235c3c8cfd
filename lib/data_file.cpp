// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "data_file.h"

#include "error.h"
#include "image_lock.h"

#include <filesystem>
#include <sys/stat.h>

namespace qlean {

namespace {

namespace fs = std::filesystem;

/// The name in the header, or nothing.
std::string name_in(const Header &header, const std::string &image) {
    const HeaderExtension *extension = header.extension(Header::extension_data_file);
    if (extension == nullptr || extension->data.empty())
        return {};
    std::string name(reinterpret_cast<const char *>(extension->data.data()), extension->data.size());
    for (const char c : name)
        if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f)
            throw_bad_image("'{}' is damaged: the name of its data file holds control characters", image);
    if (name.rfind("file:", 0) == 0)
        return name.substr(5);
    // As QEMU: what stands before a colon, up to the first slash, is a protocol.
    if (name.find(':') < name.find('/'))
        throw Error(
            Error::Kind::unsupported, ENOTSUP,
            fmt::format("'{}' keeps its data in '{}', which is not a plain file name; name the file with data-file= "
                        "(qlean: --data-file)",
                        image, name));
    return name;
}

[[noreturn]] void throw_missing(const std::string &image, const std::string &what) {
    throw Error(Error::Kind::io, ENOENT,
                fmt::format("'{}' keeps the guest's data in another file, {}; put it there, or name it with data-file= "
                            "(qlean: --data-file)",
                            image, what));
}

} // namespace

void require_sane_data_file(const Header &header, const std::string &image) {
    const bool raw = header.autoclear & Header::autoclear_data_file_raw;
    if (!header.has_data_file()) {
        if (raw)
            throw_bad_image("'{}' is damaged: it should be raw external data, but has no data file", image);
        return;
    }
    if (header.snapshot_count != 0)
        throw_bad_image("'{}' is damaged: an image with a data file cannot have internal snapshots", image);
    if (raw && !header.backing_file.empty())
        throw_bad_image("'{}' is damaged: its data file should be the whole disk (raw), but it has a backing file",
                        image);
}

std::string find_data_file(const Header &header, const std::string &path, const std::string &chosen) {
    if (!chosen.empty())
        return chosen;
    const std::string name = name_in(header, path);
    if (name.empty())
        throw_missing(path, "and does not say which");
    const fs::path beside = fs::path(path).parent_path() / name; // an absolute name stays as it is
    std::error_code error;
    if (fs::path(name).is_absolute())
        return name;
    const bool here = fs::exists(name, error), there = fs::exists(beside, error);
    if (here && there && !fs::equivalent(name, beside, error))
        throw Error(
            Error::Kind::unsupported, EINVAL,
            fmt::format(
                "'{}' keeps the guest's data in '{}': there is such a file beside the image, and another in the "
                "current directory, which is where QEMU looks; name the right one with data-file= "
                "(qlean: --data-file)",
                path, name));
    if (!here && !there)
        throw_missing(path, fmt::format("'{}', which is neither beside the image nor in the current directory", name));
    return there ? beside.string() : fs::absolute(name, error).string();
}

std::unique_ptr<PosixFile> open_data_file(const Header &header, const PosixFile &image, const std::string &chosen,
                                          PosixFile::Access access) {
    const std::string path = find_data_file(header, image.name(), chosen);
    struct stat st, own;
    if (::stat(path.c_str(), &st) == -1)
        throw_missing(image.name(),
                      fmt::format("'{}', which cannot be found ({})", path, std::generic_category().message(errno)));
    if (!S_ISREG(st.st_mode))
        throw Error(
            Error::Kind::unsupported, EINVAL,
            fmt::format("'{}' keeps the guest's data in '{}', which is not a regular file", image.name(), path));
    if (::fstat(image.descriptor(), &own) == 0 && own.st_dev == st.st_dev && own.st_ino == st.st_ino)
        throw_bad_image("'{}' is damaged: it names itself as its data file", image.name());
    auto file = PosixFile::open(path, access);
    lock_data_file(*file, access);
    return file;
}

DataFile::DataFile(std::unique_ptr<File> file, const Header &header, const std::string &image)
    : file_(std::move(file)), disk_size_(header.virtual_size) {
    const bool raw = header.autoclear & Header::autoclear_data_file_raw;
    if (const std::uint64_t length = file_->length(); raw && length < header.virtual_size)
        throw_bad_image(
            "'{}' is truncated: it should be the whole disk of '{}', {} bytes, but has {}; restore it, or, if what "
            "is missing was zeroes, lengthen it with 'truncate -s {}'",
            file_->name(), image, header.virtual_size, length, header.virtual_size);
}

std::uint64_t DataFile::inside(HostOffset at, std::uint64_t length) const {
    const std::uint64_t end = disk_size_;
    return at.value >= end ? 0 : std::min(length, end - at.value);
}

void DataFile::write(std::span<const std::byte> from, HostOffset at) {
    if (const auto n = inside(at, from.size()); n > 0)
        file_->write(from.first(n), at);
}

bool DataFile::punch(HostOffset at, std::uint64_t length) {
    const auto n = inside(at, length);
    return n == 0 || file_->punch(at, n);
}

bool DataFile::zero_keeping_space(HostOffset at, std::uint64_t length) {
    const auto n = inside(at, length);
    return n == 0 || file_->zero_keeping_space(at, n);
}

void DataFile::truncate(std::uint64_t) { throw std::logic_error("a data file keeps its length"); }

void DataFile::grow_disk(std::uint64_t from, std::uint64_t to) {
    // What was beyond the end of the disk is nothing that a guest may see.
    if (file_->length() > from)
        file_->truncate(from);
    file_->truncate(to);
    disk_size_ = to;
}

void DataFile::reserve_space(HostOffset at, std::uint64_t length) {
    if (const auto n = inside(at, length); n > 0)
        file_->reserve_space(at, n);
}

} // namespace qlean
