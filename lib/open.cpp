// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Opening: from a file to the parts of an image, or one clear sentence. What is read is bounded by what the header
// may claim (32 MiB of L1, 8 MiB of refcount table) and does not grow with what is allocated.
#include "byte_order.h"
#include "check/check.h"
#include "data_file.h"
#include "encrypted_file.h"
#include "error.h"
#include "image.h"
#include "image_lock.h"
#include "luks.h"
#include "posix_file.h"

namespace qlean {

namespace {

/// A crash may leave refcounts for clusters that the file did not get; more than this many are damage.
constexpr std::uint64_t max_clusters_beyond_end = std::uint64_t{1} << 26;
/// Of each cluster of the file a few bits are kept in memory, and a file with holes can claim any length. It is as many
/// as can be checked: 128 TiB of clusters of 64 KiB.
constexpr std::uint64_t max_clusters = std::uint64_t{1} << 31;

std::vector<std::uint64_t> read_words(File &file, HostOffset at, std::uint64_t count) {
    std::vector<std::uint64_t> words(count);
    file.read(std::as_writable_bytes(std::span(words)), at);
    return words;
}

void require_inside(const File &file, HostOffset at, std::uint64_t bytes, std::uint64_t length, const char *what) {
    if (at.value > length || bytes > length - at.value)
        throw_bad_image("'{}' is truncated: its {} at {:#x} lies beyond the end of the file ({} bytes)", file.name(),
                        what, at.value, length);
}

void check_l1(const File &file, const Geometry &geometry, const std::vector<std::uint64_t> &words,
              std::uint64_t length) {
    for (std::size_t i = 0; i < words.size(); ++i) {
        const std::uint64_t word = big_endian(words[i]);
        if (word == 0)
            continue;
        if (!entry::valid_l1(word, geometry.cluster_bits()))
            throw_bad_image("'{}' is damaged: L1 entry {} is {:#x}, which is no valid table; see 'qemu-img check'",
                            file.name(), i, word);
        require_inside(file, entry::table(word), geometry.cluster_size(), length, "L2 table");
    }
}

/// The first words of the entries of an L2 table.
std::vector<std::uint64_t> read_entries(File &file, HostOffset table, const Geometry &geometry) {
    const std::uint64_t step = geometry.entry_words(), count = geometry.l2_entries();
    auto words = read_words(file, table, count * step);
    for (std::uint64_t i = 0; i < count; ++i)
        words[i] = big_endian(words[i * step]);
    words.resize(count);
    return words;
}

/// One past the highest cluster with a refcount.
std::uint64_t refcounted_end(File &file, const Geometry &geometry, const std::vector<std::uint64_t> &table,
                             std::uint64_t length) {
    for (const std::uint64_t word : table)
        if (const std::uint64_t at = big_endian(word); at != 0)
            require_inside(file, HostOffset{at}, geometry.cluster_size(), round_up(length, geometry.cluster_size()),
                           "refcount block");
    // Blocks for what lies far beyond the end are not worth reading: nothing that is used can be there.
    const std::uint64_t last =
        (geometry.clusters_for(length) + max_clusters_beyond_end) / geometry.refcounts_per_block();
    std::vector<std::byte> block(geometry.cluster_size());
    for (std::size_t i = std::min<std::size_t>(table.size(), last + 1); i-- > 0;) {
        const HostOffset at{big_endian(table[i])};
        if (at.value == 0)
            continue;
        file.read(block, at);
        const RefcountView view(block, geometry.refcount_order());
        for (std::size_t n = view.size(); n-- > 0;)
            if (view.get(n) != 0)
                return i * geometry.refcounts_per_block() + n + 1;
    }
    return 0;
}

/// Refcounts beyond the end of the file are what a crash leaves; entries beyond it mean that data is missing.
void refuse_truncated(File &file, const Geometry &geometry, const std::vector<std::uint64_t> &l1,
                      std::uint64_t length) {
    for (std::size_t i = 0; i < l1.size(); ++i) {
        const HostOffset table = entry::table(big_endian(l1[i]));
        if (table.value == 0)
            continue;
        for (const std::uint64_t word : read_entries(file, table, geometry)) {
            const auto starts = word & entry::compressed
                                    ? entry::compressed_extent(word, geometry.cluster_bits()).at.value
                                    : word & entry::offset_mask;
            if (starts >= length)
                throw_bad_image("'{}' is truncated: it refers to data at {:#x}, but ends at {} bytes; restore it from "
                                "a backup",
                                file.name(), starts, length);
        }
    }
}

} // namespace

namespace {

/// Without being told, as QEMU does: a dirty image is repaired before it is written.
bool wants_repair(const Header &header, const Image::Options &options) {
    if (options.read_only)
        return false;
    return options.repair ? *options.repair != Repair::none : (header.incompatible & Header::incompatible_dirty) != 0;
}

/// Whether an image that is marked dirty or corrupt may be served as it is asked for.
void judge_marks(const File &file, const Header &header, const Image::Options &options,
                 const std::optional<CheckReport> &repaired) {
    if (options.read_only)
        return;
    if (repaired && repaired->check_errors != 0)
        throw Error(Error::Kind::bad_image, EIO,
                    fmt::format("'{}' could not be repaired: {}; serve it read-only and copy what can be read",
                                file.name(),
                                repaired->problems.empty() ? "it cannot be checked" : repaired->problems.front()));
    if (header.incompatible & Header::incompatible_corrupt)
        throw Error(Error::Kind::bad_image, EIO,
                    fmt::format("'{}' is marked corrupt; serve it read-only, or repair it with 'qlean check --repair "
                                "all'{}",
                                file.name(),
                                repaired ? fmt::format(" ({} problems are beyond repair: {})", repaired->corruptions,
                                                       repaired->problems.empty() ? "" : repaired->problems.front())
                                         : ""));
    // What was looked at for leaks alone may still have counts that are too low, and its data would be overwritten.
    if (header.incompatible & Header::incompatible_dirty && options.repair.value_or(Repair::all) != Repair::all)
        throw Error(Error::Kind::bad_image, EIO,
                    fmt::format("'{}' has the dirty bit set: its refcounts may be wrong after a crash; open it with "
                                "repair=all, or read-only",
                                file.name()));
}

} // namespace

std::unique_ptr<Image> Image::open(std::unique_ptr<File> file, const Options &options) {
    auto [header, sector] = read_header(*file);
    header.require_supported(file->name());
    require_sane_data_file(header, file->name());
    std::optional<CheckReport> repaired;
    if (wants_repair(header, options)) {
        repaired = repair_file(*file, options.repair.value_or(Repair::all));
        std::tie(header, sector) = read_header(*file);
    }
    judge_marks(*file, header, options, repaired);
    const Geometry geometry = header.geometry();
    const std::uint64_t length = file->length();
    if (geometry.clusters_for(length) >= max_clusters)
        throw Error(Error::Kind::unsupported, EFBIG,
                    fmt::format("'{}' has {} bytes, too many for clusters of {} bytes; copy it with 'qemu-img convert'",
                                file->name(), length, geometry.cluster_size()));

    require_inside(*file, header.l1_offset, std::uint64_t{header.l1_size} * 8, length, "L1 table");
    auto l1 = read_words(*file, header.l1_offset, header.l1_size);
    check_l1(*file, geometry, l1, length);

    const std::uint64_t table_bytes = geometry.bytes(header.refcount_table_clusters);
    require_inside(*file, header.refcount_table_offset, table_bytes, round_up(length, geometry.cluster_size()),
                   "refcount table");
    auto table = read_words(*file, header.refcount_table_offset, table_bytes / 8);
    const std::uint64_t file_end = geometry.clusters_for(length);
    const std::uint64_t counted_end = refcounted_end(*file, geometry, table, length);
    if (counted_end > file_end) {
        if (counted_end - file_end > max_clusters_beyond_end)
            throw_bad_image("'{}' is damaged or truncated: {} clusters are in use, but it holds only {}", file->name(),
                            counted_end, file_end);
        if (!header.has_data_file())
            refuse_truncated(*file, geometry, l1, length);
    }
    std::unique_ptr<File> data;
    if (header.has_data_file()) {
        if (!options.open_data)
            throw Error(
                Error::Kind::unsupported, ENOTSUP,
                fmt::format("'{}' keeps the guest's data in another file, and was opened without it", file->name()));
        data = std::make_unique<DataFile>(options.open_data(header), header, file->name());
    }
    auto luks = unlock_image(*file, header, options.passphrase.get());
    if (luks)
        data = data ? std::make_unique<EncryptedFile>(std::move(data), std::move(luks->cipher))
                    : std::make_unique<EncryptedFile>(*file, std::move(luks->cipher));
    const std::uint64_t end = std::max(file_end, counted_end);
    auto bitmaps = Bitmaps::read(*file, header, end);
    if (bitmaps && !options.read_only)
        require_trackable(*bitmaps, geometry, file->name());
    auto backing = open_backing(header, *file, options.above, options.cache_bytes / 2, options.passphrase);
    // Those of an image below are of no use to anybody, and their tables may be large.
    Snapshots::Loaded snapshots =
        options.above != nullptr ? Snapshots::Loaded{} : Snapshots::load(*file, header, length);
    Opened opened{.file = std::move(file),
                  .data = std::move(data),
                  .backing = std::move(backing),
                  .header = std::move(header),
                  .encryption_header = luks ? luks->header : HostRun{},
                  .header_sector = std::move(sector),
                  .l1_words = std::move(l1),
                  .refcount_table = std::move(table),
                  .snapshots = std::move(snapshots),
                  .end = end,
                  .read_only = options.read_only,
                  .cache_bytes = options.cache_bytes,
                  .bitmaps = std::move(bitmaps)};
    return std::unique_ptr<Image>(new Image(std::make_unique<State>(std::move(opened))));
}

std::unique_ptr<Image> Image::open(const std::string &path, const Options &options) {
    const auto access = options.read_only ? PosixFile::Access::read_only : PosixFile::Access::read_write;
    auto file = PosixFile::open(path, access);
    lock_image(*file, access);
    if (!options.read_only)
        file->agree_with_device();
    PosixFile &posix = *file;
    Options with_data = options;
    with_data.open_data = [&](const Header &header) {
        auto data = open_data_file(header, posix, options.data_file, access);
        if (!options.read_only)
            data->agree_with_device();
        return data;
    };
    auto image = open(std::move(file), with_data);
    image->on_poison([&posix] { posix.remember_failed_sync(true); });
    return image;
}

} // namespace qlean
