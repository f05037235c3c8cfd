// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "compression.h"

#define ZLIB_CONST // input is not written to
#include <memory>
#include <new>
#include <zlib.h>
#include <zstd.h>

namespace qlean::compression {

namespace {

/// Negative: raw deflate. What QEMU writes needs no larger window, and it reads with no larger one.
constexpr int window_bits = -12;

/// The byte offset takes the low bits of a descriptor, the sectors follow it, up to the two flags.
constexpr unsigned offset_bits(unsigned cluster_bits) { return 62 - (cluster_bits - 8); }

Result inflate_into(std::span<const std::byte> from, std::span<std::byte> cluster) {
    z_stream stream{};
    stream.next_in = reinterpret_cast<const Bytef *>(from.data());
    stream.avail_in = static_cast<uInt>(from.size());
    stream.next_out = reinterpret_cast<Bytef *>(cluster.data());
    stream.avail_out = static_cast<uInt>(cluster.size());
    if (inflateInit2(&stream, window_bits) != Z_OK)
        throw std::bad_alloc();
    const std::unique_ptr<z_stream, decltype(&inflateEnd)> ends(&stream, inflateEnd);
    const int how = inflate(&stream, Z_FINISH);
    Result result;
    // As QEMU judges: a stream that would go on is good as far as it fills the cluster.
    result.filled = (how == Z_STREAM_END || how == Z_BUF_ERROR) && stream.avail_out == 0;
    if (result.filled && how == Z_STREAM_END)
        result.length = from.size() - stream.avail_in;
    return result;
}

Result unzstd_into(std::span<const std::byte> from, std::span<std::byte> cluster) {
    const std::unique_ptr<ZSTD_DCtx, decltype(&ZSTD_freeDCtx)> context(ZSTD_createDCtx(), ZSTD_freeDCtx);
    if (!context)
        throw std::bad_alloc();
    // Frame by frame, whole: so no window is kept, however large a frame says its own to be.
    std::size_t in = 0, out = 0;
    while (out < cluster.size()) {
        const auto rest = from.subspan(in);
        const std::size_t frame = ZSTD_findFrameCompressedSize(rest.data(), rest.size());
        if (ZSTD_isError(frame) || frame == 0 || frame > rest.size())
            return {};
        const std::size_t made =
            ZSTD_decompressDCtx(context.get(), cluster.data() + out, cluster.size() - out, rest.data(), frame);
        if (ZSTD_isError(made))
            return {};
        in += frame;
        out += made;
    }
    return {true, in};
}

} // namespace

std::optional<std::uint64_t> describe(HostOffset at, std::uint64_t length, unsigned cluster_bits) {
    const unsigned shift = offset_bits(cluster_bits);
    if (length == 0 || length > max_length(cluster_bits) || at.value >> shift != 0)
        return std::nullopt;
    const std::uint64_t more = (at.value + length - 1) / sector - at.value / sector;
    if (more >> (cluster_bits - 8) != 0)
        return std::nullopt;
    return more << shift | at.value;
}

Result decompress(Compression type, std::span<const std::byte> from, std::span<std::byte> cluster) {
    return type == Compression::zstd ? unzstd_into(from, cluster) : inflate_into(from, cluster);
}

} // namespace qlean::compression
