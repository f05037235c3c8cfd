// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "backing.h"

#include "backing_name.h"
#include "data_file.h"
#include "error.h"
#include "format_probe.h"
#include "header.h"
#include "image.h"
#include "image_lock.h"
#include "posix_file.h"

#include <cstring>

namespace qlean {

namespace {

/// Deep enough for every chain that somebody made on purpose; each image costs a descriptor and some memory.
constexpr unsigned max_depth = 200;
constexpr std::uint64_t min_cache_bytes = 1024 * 1024;

/// The part of [at, at + length) that lies below `end`.
std::uint64_t bytes_before(GuestOffset at, std::uint64_t length, std::uint64_t end) {
    return at.value >= end ? 0 : std::min(length, end - at.value);
}

class RawDisk final : public Backing {
  public:
    RawDisk(std::unique_ptr<File> file, std::uint64_t offset, std::uint64_t size)
        : file_(std::move(file)), offset_(offset), size_(size) {}

    std::uint64_t size() const override { return size_; }
    const std::string &name() const override { return file_->name(); }
    unsigned depth() const override { return 1; }

    void read(std::span<std::byte> into, GuestOffset at) override {
        const auto there = bytes_before(at, into.size(), size_);
        if (there > 0)
            file_->read(into.first(there), place(at));
        if (there < into.size())
            std::memset(into.data() + there, 0, into.size() - there);
    }

    std::vector<Extent> extents(GuestOffset at, std::uint64_t length, std::size_t most) override {
        std::vector<Extent> found;
        auto there = bytes_before(at, length, size_);
        const auto beyond = length - there;
        while (there > 0 && found.size() < most) {
            const auto data = file_->next_data(place(at));
            const bool hole = !data || *data > place(at);
            std::uint64_t n = there;
            if (hole && data)
                n = std::min(n, *data - place(at));
            else if (const HostOffset end = file_->next_hole(place(at)); !hole && end > place(at))
                n = std::min(n, end - place(at));
            found.push_back({n, !hole, hole});
            at += n;
            there -= n;
        }
        if (beyond > 0 && found.size() < most) {
            if (!found.empty() && found.back().zero)
                found.back().length += beyond;
            else
                found.push_back({beyond, false, true});
        }
        return found;
    }

    void prefetch(GuestOffset at, std::uint64_t length) override {
        if (const auto there = bytes_before(at, length, size_); there > 0)
            file_->will_need(place(at), there);
    }

  private:
    HostOffset place(GuestOffset at) const { return {offset_ + at.value}; }

    const std::unique_ptr<File> file_;
    const std::uint64_t offset_, size_;
};

class ImageBelow final : public Backing {
  public:
    explicit ImageBelow(std::unique_ptr<Image> image) : image_(std::move(image)) {}

    std::uint64_t size() const override { return image_->size(); }
    const std::string &name() const override { return image_->state().file.name(); }
    unsigned depth() const override {
        const Backing *below = image_->state().contents.below();
        return 1 + (below == nullptr ? 0 : below->depth());
    }

    void read(std::span<std::byte> into, GuestOffset at) override {
        const auto there = bytes_before(at, into.size(), size());
        if (there > 0)
            image_->read(into.first(there), at);
        if (there < into.size())
            std::memset(into.data() + there, 0, into.size() - there);
    }

    std::vector<Extent> extents(GuestOffset at, std::uint64_t length, std::size_t most) override {
        std::vector<Extent> found;
        const auto there = bytes_before(at, length, size());
        std::uint64_t told = 0;
        if (there > 0)
            for (const Image::Extent &e : image_->extents(at, there, most)) {
                found.push_back({e.length, e.allocated, e.zero});
                told += e.length;
            }
        if (told == there && there < length && found.size() < most)
            found.push_back({length - there, false, true});
        return found;
    }

    void prefetch(GuestOffset at, std::uint64_t length) override {
        if (const auto there = bytes_before(at, length, size()); there > 0)
            image_->prefetch(at, there);
    }

  private:
    const std::unique_ptr<Image> image_;
};

/// A chain that comes back to a file it has passed would never end.
void require_new(const File &file, const ChainLink &above) {
    unsigned depth = 1;
    for (const ChainLink *link = &above; link != nullptr; link = link->above, ++depth)
        if (file.identity() && link->file.identity() == file.identity())
            throw_bad_image("the backing file '{}' of '{}' is one of the images that lie above it: the chain never "
                            "ends; correct the name with 'qemu-img rebase -u'",
                            file.name(), above.file.name());
    if (depth > max_depth)
        throw Error(Error::Kind::unsupported, ENOTSUP,
                    fmt::format("more than {} images lie below one another, down to '{}'; shorten the chain with "
                                "'qemu-img commit' or 'qemu-img rebase'",
                                max_depth, above.file.name()));
}

BackingName::Format format_of(File &file, const BackingName &name, const File &named_by) {
    if (name.format != BackingName::Format::probe)
        return name.format;
    std::vector<std::byte> head(std::min<std::uint64_t>(file.length(), format_probe_bytes));
    file.read(head, HostOffset{0});
    const std::string format = probe_format(head, name.path);
    if (format == "qcow2")
        return BackingName::Format::qcow2;
    if (format != "raw")
        throw Error(Error::Kind::unsupported, ENOTSUP,
                    fmt::format("the backing file '{}' of '{}' looks like format '{}', which is not supported; only "
                                "raw and QCOW2 files of this host can lie below an image",
                                name.path, named_by.name(), format));
    return BackingName::Format::raw;
}

std::unique_ptr<Backing> open_raw(std::unique_ptr<File> file, const BackingName &name) {
    const std::uint64_t length = file->length();
    if (name.offset > length || (name.size && *name.size > length - name.offset))
        throw_bad_image("the backing file '{}' has {} bytes, too few for the part of it that is asked for",
                        file->name(), length);
    return std::make_unique<RawDisk>(std::move(file), name.offset, name.size.value_or(length - name.offset));
}

} // namespace

std::unique_ptr<Backing> open_backing(const Header &header, const File &file, const ChainLink *above,
                                      std::uint64_t cache_bytes, const std::shared_ptr<const Secret> &passphrase) {
    if (header.backing_file.empty())
        return nullptr;
    const HeaderExtension *extension = header.extension(Header::extension_backing_format);
    const auto format = extension == nullptr ? std::string()
                                             : std::string(reinterpret_cast<const char *>(extension->data.data()),
                                                           extension->data.size());
    const ChainLink link{above, file};
    const BackingName name = parse_backing_name(file.name(), header.backing_file, format);
    try {
        auto below = PosixFile::open(name.path, PosixFile::Access::read_only, PosixFile::Devices::accepted);
        using Host = BackingName::Host;
        if (name.host != Host::any && (name.host == Host::device) != below->is_device())
            throw Error(Error::Kind::unsupported, ENOTSUP,
                        fmt::format("'{}' is named as a {}, which it is not", name.path,
                                    name.host == Host::device ? "block device" : "regular file"));
        require_new(*below, link);
        lock_image(*below, PosixFile::Access::read_only);
        if (format_of(*below, name, file) == BackingName::Format::raw)
            return open_raw(std::move(below), name);
        Image::Options options;
        options.read_only = true;
        // The one below it gets half of this, and so on.
        options.cache_bytes = std::max(cache_bytes, min_cache_bytes);
        options.above = &link;
        options.passphrase = passphrase;
        options.open_data = [&posix = *below](const Header &header) {
            return open_data_file(header, posix, {}, PosixFile::Access::read_only);
        };
        return std::make_unique<ImageBelow>(Image::open(std::move(below), options));
    } catch (const Error &error) {
        if (above != nullptr)
            throw;
        // Whoever opened the image may not know what lies below it.
        throw Error(error.kind(), error.errno_value(),
                    fmt::format("'{}' cannot be opened without its backing file: {}", file.name(), error.what()));
    }
}

} // namespace qlean
