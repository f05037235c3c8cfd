// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The decoders of the format, each by itself: the first byte of an input chooses one, the rest is what it decodes.
// A decoder throws Error or gives something; what it gives is encoded and decoded again, where that can be, and must
// be the same. None takes more memory than `most_bytes`.
#include "lib/backing_name.h"
#include "lib/bitmap_directory.h"
#include "lib/byte_order.h"
#include "lib/check/check.h"
#include "lib/compression.h"
#include "lib/format_probe.h"
#include "lib/header.h"
#include "lib/image.h"
#include "lib/luks.h"
#include "lib/refcount_block.h"
#include "lib/snapshot_table.h"
#include "tests/fuzz/input.h"
#include "tests/fuzz/memory_bound.h"
#include "tests/fuzz/memory_file.h"

#include <array>
#include <optional>

using namespace qlean;
using namespace qlean::fuzz;

namespace {

/// For inputs of a few KiB: a cluster, and what libraries want.
constexpr std::uint64_t most_bytes = 8 * 1024 * 1024;
const std::string name = "fuzzed.qcow2";

Geometry some_geometry(Input &in) {
    const auto cluster_bits = static_cast<unsigned>(9 + in.below(13));
    return {cluster_bits, static_cast<unsigned>(in.below(7)), in.number(5), cluster_bits >= 14 && in.byte() % 2 != 0};
}

void header(Input &in) {
    const auto bytes = in.rest();
    const Header h = Header::parse(bytes, name);
    // What is written back says the same to who reads it.
    std::vector<std::byte> again(bytes.begin(), bytes.end());
    h.update(again);
    const Header second = Header::parse(again, name);
    require(second.encode() == h.encode() && second.backing_file == h.backing_file, "a header changed by rewriting it");
    require(std::equal(again.begin(), again.end(), bytes.begin()), "rewriting a header changed bytes of it");
    h.require_supported(name);
}

void snapshots(Input &in) {
    const Geometry geometry = some_geometry(in);
    const auto count = static_cast<std::uint32_t>(in.number(3));
    std::uint64_t length = 0, again_length = 0;
    const auto table = SnapshotTable::decode(in.rest(), count, geometry, name, &length);
    const auto bytes = table.encode();
    require(bytes.size() == length && table.entries.size() == count, "a snapshot table has another length");
    require(SnapshotTable::decode(bytes, count, geometry, name, &again_length).entries == table.entries,
            "a snapshot table changed by encoding it");
    require(table.positions().size() == count, "positions of another table");
    for (const SnapshotEntry &e : table.entries)
        require(e.disk_size(0) <= std::uint64_t{1} << 62, "a snapshot of an impossible size");
}

void bitmaps(Input &in) {
    const Geometry geometry = some_geometry(in);
    const auto extension = in.take(BitmapsExtension::bytes);
    try {
        const auto e = BitmapsExtension::parse(extension, geometry, name);
        require(e.directory_bytes <= BitmapsExtension::max_directory_bytes, "an impossible directory");
    } catch (const Error &) {
    }
    const auto count = static_cast<std::uint32_t>(in.number(2));
    const auto bytes = in.rest();
    for (std::size_t at = 0; at + 8 <= bytes.size(); at += 8) {
        const auto word = BitmapWord::decode(load_be<std::uint64_t>(bytes, at), geometry);
        require((word.kind == BitmapWord::Kind::stored) == (word.host.value != 0), "a stored cluster of bits nowhere");
    }
    for (const BitmapEntry &e : parse_bitmap_directory(bytes, count, geometry, name)) {
        require(e.at < bytes.size() && e.table_bytes() <= bytes.size() * BitmapEntry::max_bitmap_bytes,
                "a bitmap entry beyond its directory");
        require(e.in_use() || e.table_size == e.words_wanted(geometry), "a bitmap of the wrong size");
    }
}

void entries(Input &in) {
    const auto bits = static_cast<unsigned>(9 + in.below(13));
    const EntryFormat format{bits, static_cast<unsigned>(2 + in.below(2)), bits >= 14 && in.byte() % 2 != 0,
                             in.byte() % 4 == 0};
    while (!in.empty()) {
        const L2Words words{in.number(8), format.subclusters ? in.number(8) : 0};
        const Mapping m = entry::decode(words, format);
        if (m.has_host())
            require(m.host.value >> (host_offset_bits - bits) == 0, "a host cluster that no entry can name");
        if (m.kind != Mapping::Kind::compressed)
            continue;
        const CompressedExtent extent = entry::compressed_extent(m.bits, bits);
        require(extent.bytes > 0 && (extent.at + extent.bytes).value % compression::sector == 0 &&
                    extent.bytes <= compression::max_length(bits),
                "an extent of impossible length");
        const auto described = compression::describe(extent.at, extent.bytes, bits);
        require(!described || *described == m.bits, "a descriptor that says something else");
    }
}

void refcounts(Input &in) {
    const auto order = static_cast<unsigned>(in.below(7));
    const auto i = in.number(2);
    const auto value = in.number(8);
    const auto from = in.take(round_down(in.take(4096).size(), 8)); // whatever is left is not of interest
    std::vector<std::byte> bytes(from.begin(), from.end());
    bytes.resize(round_up(bytes.size() + 8, 8));
    const auto before = bytes;
    RefcountView view(bytes, order);
    const std::size_t at = i % view.size();
    view.set(at, value & RefcountView::max(order));
    require(view.get(at) == (value & RefcountView::max(order)), "a refcount that is not what was set");
    RefcountView old(const_cast<std::vector<std::byte> &>(before), order);
    for (std::size_t n = 0; n < view.size(); ++n)
        require(n == at || view.get(n) == old.get(n), "a refcount that nobody set");
}

void backing_names(Input &in) {
    const std::string format(std::array{"", "raw", "qcow2", "file"}[in.below(4)]);
    const std::string text = in.text();
    probe_format(std::as_bytes(std::span(text)), text);
    require(!parse_backing_name("/images/top.qcow2", text, format).path.empty() || text.empty() || text == "file:" ||
                text == "host_device:",
            "a backing file without a name");
}

void decompression(Input &in) {
    const auto type = in.byte() % 2 ? Compression::zstd : Compression::deflate;
    std::vector<std::byte> cluster(std::uint64_t{512} << in.below(13));
    const auto from = in.rest();
    const auto result = compression::decompress(type, from, cluster);
    require(!result.length || (result.filled && *result.length <= from.size()), "more input used than there is");
}

void luks(Input &in) {
    const auto given = in.rest();
    std::vector<std::byte> bytes(given.begin(), given.end());
    bytes.resize(std::min<std::size_t>(bytes.size() + 4096, 65536));
    // How long opening takes is the header's choice (SECURITY.md); here it may choose a moment.
    constexpr std::size_t slots = 8, slots_at = 208, slot_bytes = 48;
    const auto shorten = [&](std::size_t at) {
        store_be<std::uint32_t>(bytes, at, load_be<std::uint32_t>(bytes, at) % 8);
    };
    shorten(164);
    for (std::size_t slot = 0; slot < slots; ++slot)
        shorten(slots_at + slot * slot_bytes + 4);
    LuksPointer::parse(given, Geometry(16, 4, 1 << 20), name);
    unlock_luks(bytes, Secret("passphrase"), name);
}

/// All of a file, as it is: `sparse` bytes of holes after it.
void file(Input &in) {
    const std::uint64_t sparse = in.byte() % 8 == 0 ? in.number(3) * 64 : 0;
    const auto bytes = in.rest();
    const auto disk = std::make_shared<MemoryDisk>(std::vector(bytes.begin(), bytes.end()));
    disk->length += sparse;
    const MemoryBound bound(bound_for_image(disk->length, MemoryDisk::most_bytes));
    MemoryFile memory(disk);
    try {
        if (!Header::parse(bytes, name).backing_file.empty())
            return; // a file of this host: not the fuzzer's
        check_file(memory);
    } catch (const Error &) {
    }
    const auto use = [&](bool read_only) {
        Image::Options options;
        options.read_only = read_only;
        options.cache_bytes = 65536;
        options.passphrase = nullptr;
        const auto image = Image::open(std::make_unique<MemoryFile>(disk), options);
        std::vector<std::byte> into(std::min<std::uint64_t>(image->size(), 65536));
        image->read(into, {0});
        image->extents({0}, into.size(), 100);
        if (!read_only && !into.empty()) {
            image->write(std::span(into).first(1), {into.size() - 1});
            image->close();
        }
    };
    for (const bool read_only : {true, false})
        try {
            use(read_only);
        } catch (const Error &) {
        }
    const CheckReport report = repair_file(memory, Repair::all);
    require(!report.clean() || check_file(memory).clean(), "a repair says that all is well, and the check does not");
}

constexpr std::array decoders = {header,        snapshots,     bitmaps, entries, refcounts,
                                 backing_names, decompression, luks,    file};

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t *data, std::size_t size);
int LLVMFuzzerTestOneInput(const std::uint8_t *data, std::size_t size) {
    Input in(data, size);
    try {
        const std::size_t which = in.below(decoders.size());
        std::optional<MemoryBound> bound;
        if (decoders[which] != file) // which sets its own
            bound.emplace(most_bytes);
        decoders[which](in);
    } catch (const Error &) {
    }
    return 0;
}
