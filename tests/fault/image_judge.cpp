// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "tests/fault/image_judge.h"

#include "lib/byte_order.h"

#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fmt/format.h>
#include <sys/wait.h>
#include <unistd.h>
#include <zlib.h>

namespace qlean::fault {

namespace {

constexpr std::uint64_t copied = 1ull << 63, compressed = 1ull << 62, offset_mask = 0x00fffffffffffe00ull;
constexpr std::size_t enough = 8; ///< complaints

class Judge {
  public:
    explicit Judge(std::span<const std::byte> image) : image_(image) {}

    Verdict judge() {
        if (!read_header())
            return verdict_;
        references_.assign(divide_up(image_.size(), cluster_), 0);
        refer(0, cluster_, "the header");
        refer(l1_at_, l1_size_ * 8, "the L1 table");
        refer(table_at_, table_clusters_ * cluster_, "the refcount table");
        walk_refcounts();
        walk_snapshots();
        walk_tables();
        walk_bitmaps();
        compare();
        return verdict_;
    }

    Bytes guest() { return read_header() ? disk_of(l1_at_, virtual_size_) : Bytes{}; }

    SnapshotDisks snapshots() {
        SnapshotDisks disks;
        if (!read_header())
            return disks;
        references_.assign(divide_up(image_.size(), cluster_), 0);
        for (const Snapshot &s : read_snapshots())
            disks[s.name] = disk_of(s.l1_at, s.disk_size);
        return disks;
    }

    Bytes disk_of(std::uint64_t l1_at, std::uint64_t disk_size) const {
        Bytes disk(round_up(disk_size, cluster_));
        for (std::uint64_t c = 0; c * cluster_ < disk_size; ++c) {
            const std::uint64_t table = be64(l1_at + c / entries_ * 8) & offset_mask;
            const std::uint64_t entry = table + c % entries_ * entry_size_;
            const std::uint64_t word = table == 0 ? 0 : be64(entry);
            const std::uint64_t at = word & offset_mask;
            if (word & compressed) {
                inflate_into(word, std::span(disk).subspan(c * cluster_, cluster_));
                continue;
            }
            if (at == 0 || at >= image_.size() || (!extended_ && word & 1))
                continue;
            // Without subclusters the cluster is one of its own.
            const std::uint64_t bitmap = extended_ ? be64(entry + 8) : 1, size = extended_ ? cluster_ / 32 : cluster_;
            for (std::uint64_t sub = 0; sub < cluster_ / size; ++sub)
                if (const std::uint64_t from = at + sub * size; bitmap >> sub & 1 && from < image_.size())
                    std::memcpy(disk.data() + c * cluster_ + sub * size, image_.data() + from,
                                std::min(size, image_.size() - from));
        }
        disk.resize(disk_size);
        return disk;
    }

    struct Bitmap {
        std::uint64_t table, words;
        std::uint32_t flags;
        Bytes stored; ///< a cluster each, zeroes where there is none
    };
    /// Those that count.
    std::vector<Bitmap> bitmaps() {
        std::vector<Bitmap> found;
        if (!read_header() || version_ < 3 || !(be64(88) & 1))
            return found;
        std::uint64_t at = load_be<std::uint32_t>(image_, 100);
        while (at + 32 <= image_.size() && load_be<std::uint32_t>(image_, at) != 0x23852875) {
            if (load_be<std::uint32_t>(image_, at) == 0)
                return found;
            at += 8 + round_up(load_be<std::uint32_t>(image_, at + 4), 8);
        }
        const std::uint64_t count = load_be<std::uint32_t>(image_, at + 8), bytes = be64(at + 16);
        directory_ = be64(at + 24);
        directory_bytes_ = bytes;
        std::uint64_t entry = directory_;
        for (std::uint64_t i = 0; i < count && entry + 24 <= image_.size(); ++i) {
            Bitmap b{
                be64(entry), load_be<std::uint32_t>(image_, entry + 8), load_be<std::uint32_t>(image_, entry + 12), {}};
            if (b.table % cluster_ != 0 || b.words > 4096 || b.flags > 3) {
                blame("bitmap {} is damaged", i);
                return found;
            }
            b.stored.resize(b.words * cluster_);
            for (std::uint64_t w = 0; w < b.words; ++w)
                if (const std::uint64_t data = be64(b.table + w * 8); data != 0 && data + cluster_ <= image_.size())
                    std::memcpy(b.stored.data() + w * cluster_, image_.data() + data, cluster_);
            found.push_back(std::move(b));
            entry += round_up(24 + load_be<std::uint16_t>(image_, entry + 18), 8);
        }
        if (found.size() != count || entry != directory_ + bytes)
            blame("the bitmap directory is damaged");
        return found;
    }

  private:
    void walk_bitmaps() {
        const auto found = bitmaps();
        if (found.empty())
            return;
        refer(directory_, directory_bytes_, "the bitmap directory");
        for (const Bitmap &b : found) {
            refer(b.table, b.words * 8, "a bitmap table");
            for (std::uint64_t w = 0; w < b.words; ++w)
                if (const std::uint64_t data = be64(b.table + w * 8); data != 0)
                    refer(data, cluster_, "stored bits of a bitmap");
        }
    }

    template <class... Args>
    void blame(fmt::format_string<Args...> text, Args &&...args) {
        if (verdict_.corruptions.size() < enough)
            verdict_.corruptions.push_back(fmt::format(text, std::forward<Args>(args)...));
    }
    std::uint64_t be64(std::uint64_t at) const {
        return at + 8 <= image_.size() ? load_be<std::uint64_t>(image_, at) : 0;
    }

    bool read_header() {
        if (image_.size() < 104 || load_be<std::uint32_t>(image_, 0) != 0x514649fb) {
            blame("no header");
            return false;
        }
        const auto bits = load_be<std::uint32_t>(image_, 20);
        version_ = load_be<std::uint32_t>(image_, 4);
        if (bits < 9 || bits > 21 || (version_ != 2 && version_ != 3)) {
            blame("an impossible header");
            return false;
        }
        cluster_ = 1ull << bits;
        virtual_size_ = load_be<std::uint64_t>(image_, 24);
        l1_size_ = load_be<std::uint32_t>(image_, 36);
        l1_at_ = load_be<std::uint64_t>(image_, 40);
        table_at_ = load_be<std::uint64_t>(image_, 48);
        table_clusters_ = load_be<std::uint32_t>(image_, 56);
        order_ = version_ == 3 ? load_be<std::uint32_t>(image_, 96) : 4;
        if (version_ == 3 && load_be<std::uint64_t>(image_, 72) & 3)
            blame("the image is marked dirty or corrupt");
        extended_ = version_ == 3 && load_be<std::uint64_t>(image_, 72) & 16;
        entry_size_ = extended_ ? 16 : 8;
        entries_ = cluster_ / entry_size_;
        if (l1_at_ % cluster_ || table_at_ % cluster_ || l1_at_ + l1_size_ * 8 > image_.size() ||
            table_at_ + table_clusters_ * cluster_ > round_up(image_.size(), cluster_) ||
            l1_size_ < divide_up(divide_up(virtual_size_, cluster_), entries_)) {
            blame("the L1 table or the refcount table lies outside the file");
            return false;
        }
        return true;
    }

    /// `shared`: something else may use it too, if that is shared as well.
    void refer(std::uint64_t at, std::uint64_t length, const std::string &who, bool shared = false) {
        if (at % cluster_ != 0)
            return blame("{} is at {:#x}, not a cluster boundary", who, at);
        for (std::uint64_t c = at / cluster_; c < divide_up(at + length, cluster_); ++c) {
            if (c >= references_.size())
                return blame("{} is in cluster {}, beyond the end of the file ({} clusters)", who, c,
                             references_.size());
            sole_.resize(references_.size());
            sole_[c] = sole_[c] || !shared;
            if (++references_[c] > 1 && sole_[c])
                blame("{} is in cluster {}, which something else uses as well", who, c);
        }
    }

    struct Extent {
        std::uint64_t at, end;
    };
    Extent extent_of(std::uint64_t word) const {
        const unsigned bits = 62 - (static_cast<unsigned>(std::countr_zero(cluster_)) - 8);
        const std::uint64_t at = word & ((1ull << bits) - 1), more = (word & (compressed - 1)) >> bits;
        return {at, (at / 512 + more + 1) * 512};
    }
    /// Extents may share a cluster with each other, but with nothing else.
    void refer_to_extent(std::uint64_t word, std::uint64_t guest) {
        const Extent extent = extent_of(word);
        if (word & copied)
            blame("the compressed cluster at guest offset {:#x} says COPIED", guest);
        packs_.resize(references_.size());
        for (std::uint64_t c = extent.at / cluster_; c < divide_up(extent.end, cluster_); ++c) {
            if (c >= references_.size())
                return blame("guest offset {:#x} is in cluster {}, beyond the end of the file", guest, c);
            if (references_[c]++ > 0 && !packs_[c])
                blame("guest offset {:#x} is in cluster {}, which something else uses as well", guest, c);
            packs_[c] = true;
        }
    }
    void inflate_into(std::uint64_t word, std::span<std::byte> disk) const {
        const Extent extent = extent_of(word);
        if (extent.at >= image_.size())
            return;
        z_stream stream{};
        inflateInit2(&stream, -12);
        stream.next_in = const_cast<Bytef *>(reinterpret_cast<const Bytef *>(image_.data() + extent.at));
        stream.avail_in = static_cast<uInt>(std::min<std::uint64_t>(extent.end, image_.size()) - extent.at);
        stream.next_out = reinterpret_cast<Bytef *>(disk.data());
        stream.avail_out = static_cast<uInt>(disk.size());
        inflate(&stream, Z_FINISH);
        inflateEnd(&stream);
    }

    void walk_refcounts() {
        const std::uint64_t per_block = cluster_ * 8 >> order_;
        for (std::uint64_t r = 0; r < table_clusters_ * cluster_ / 8; ++r) {
            const std::uint64_t at = be64(table_at_ + r * 8);
            if (at == 0)
                continue;
            refer(at, cluster_, fmt::format("refcount block {}", r));
            if (at % cluster_ != 0 || at + cluster_ > round_up(image_.size(), cluster_))
                continue;
            counts_.resize((r + 1) * per_block);
            for (std::uint64_t i = 0; i < per_block; ++i)
                counts_[r * per_block + i] = count_at(at, i);
        }
    }

    std::uint64_t count_at(std::uint64_t block, std::uint64_t i) const {
        const std::uint64_t bit = i << order_, width = 1ull << order_;
        std::uint64_t value = 0;
        if (width < 8) {
            const auto byte = std::to_integer<std::uint64_t>(image_[block + bit / 8]);
            return byte >> bit % 8 & ((1u << width) - 1);
        }
        for (std::uint64_t b = 0; b < width / 8; ++b)
            value = value << 8 | std::to_integer<std::uint64_t>(image_[block + bit / 8 + b]);
        return value;
    }
    std::uint64_t count(std::uint64_t c) const { return c < counts_.size() ? counts_[c] : 0; }

    void require_copied(std::uint64_t word, std::uint64_t at, const std::string &who) {
        if (word & copied && count(at / cluster_) != 1)
            blame("{} says COPIED, but the refcount of cluster {} is {}", who, at / cluster_, count(at / cluster_));
    }

    struct Snapshot {
        std::uint64_t l1_at, l1_size, disk_size;
        std::string name;
    };

    /// By the snapshot table; refers to it.
    std::vector<Snapshot> read_snapshots() {
        std::vector<Snapshot> all;
        const auto count = load_be<std::uint32_t>(image_, 60);
        const std::uint64_t begin = be64(64);
        std::uint64_t at = begin;
        for (std::uint32_t i = 0; i < count; ++i) {
            at = round_up(at, 8);
            if (at + 40 > image_.size()) {
                blame("snapshot {} lies outside the file", i);
                return all;
            }
            const auto id = load_be<std::uint16_t>(image_, at + 12), name = load_be<std::uint16_t>(image_, at + 14);
            const auto extra = load_be<std::uint32_t>(image_, at + 36);
            Snapshot s{be64(at), load_be<std::uint32_t>(image_, at + 8), virtual_size_, {}};
            if (at + 40 + extra + id + name > image_.size() || s.l1_at + s.l1_size * 8 > image_.size()) {
                blame("snapshot {} or its L1 table lies outside the file", i);
                return all;
            }
            if (extra >= 16)
                s.disk_size = be64(at + 48);
            s.name.assign(reinterpret_cast<const char *>(image_.data()) + at + 40 + extra + id, name);
            at += 40 + extra + id + name;
            all.push_back(s);
        }
        if (count != 0)
            refer(begin, at - begin, "the snapshot table");
        return all;
    }

    void walk_snapshots() {
        const auto all = read_snapshots();
        has_snapshots_ = !all.empty();
        for (const Snapshot &s : all) {
            refer(s.l1_at, s.l1_size * 8, "the L1 table of snapshot " + s.name);
            walk_l1(s.l1_at, s.l1_size, "snapshot " + s.name + ", ", false);
        }
    }

    void walk_tables() { walk_l1(l1_at_, l1_size_, "", true); }

    void walk_l1(std::uint64_t l1_at, std::uint64_t l1_size, const std::string &whose, bool active) {
        for (std::uint64_t i = 0; i < l1_size; ++i) {
            const std::uint64_t l1 = be64(l1_at + i * 8), table = l1 & offset_mask;
            if (l1 & ~(copied | offset_mask))
                blame("{}L1 entry {} has reserved bits set", whose, i);
            if (table == 0)
                continue;
            refer(table, cluster_, fmt::format("{}L2 table {}", whose, i), has_snapshots_ && !(active && l1 & copied));
            if (active)
                require_copied(l1, table, fmt::format("L1 entry {}", i));
            for (std::uint64_t n = 0; n < entries_; ++n) {
                const std::uint64_t word = be64(table + n * entry_size_), at = word & offset_mask;
                const std::uint64_t guest = (i * entries_ + n) * cluster_;
                if (word & compressed) {
                    refer_to_extent(word, guest);
                    continue;
                }
                if (word & ~(copied | offset_mask | 1) || (word & 1 && (version_ < 3 || extended_))) {
                    blame("the L2 entry of guest offset {:#x} is {:#x}", guest, word);
                    continue;
                }
                const std::uint64_t bitmap = extended_ ? be64(table + n * entry_size_ + 8) : 0;
                if (bitmap >> 32 & bitmap || (at == 0 && bitmap & 0xffffffff))
                    blame("the subclusters of guest offset {:#x} are {:#x}, with host offset {:#x}", guest, bitmap, at);
                if (at == 0)
                    continue;
                refer(at, cluster_, fmt::format("{}guest offset {:#x}", whose, guest),
                      has_snapshots_ && !(active && word & copied));
                if (active)
                    require_copied(word, at, fmt::format("the L2 entry of guest offset {:#x}", guest));
            }
        }
    }

    void compare() {
        for (std::uint64_t c = 0; c < std::max(references_.size(), counts_.size()); ++c) {
            const std::uint64_t uses = c < references_.size() ? references_[c] : 0;
            if (count(c) < uses)
                blame("cluster {} is used {} times, but its refcount is {}", c, uses, count(c));
            verdict_.leaks += count(c) > uses;
        }
    }

    std::span<const std::byte> image_;
    Verdict verdict_;
    std::uint64_t cluster_ = 0, virtual_size_ = 0, l1_size_ = 0, l1_at_ = 0, table_at_ = 0, table_clusters_ = 0;
    std::uint64_t directory_ = 0, directory_bytes_ = 0;
    std::uint64_t entry_size_ = 8, entries_ = 0; ///< of an L2 table
    unsigned version_ = 0, order_ = 0;
    bool extended_ = false;
    std::vector<std::uint64_t> references_, counts_;
    std::vector<bool> sole_; ///< by cluster: used by somebody who shares it with nobody
    bool has_snapshots_ = false;
    std::vector<bool> packs_; ///< clusters that hold compressed extents
};

} // namespace

std::string Verdict::text() const {
    std::string text;
    for (const auto &line : corruptions)
        text += line + "\n";
    return text + fmt::format("{} leaked clusters", leaks);
}

Verdict judge(std::span<const std::byte> image) { return Judge(image).judge(); }

Bytes guest_bytes(std::span<const std::byte> image) { return Judge(image).guest(); }

SnapshotDisks snapshot_disks(std::span<const std::byte> image) { return Judge(image).snapshots(); }

std::optional<std::string> judge_snapshots(std::span<const std::byte> image, const SnapshotDisks &then) {
    const auto now = snapshot_disks(image);
    if (now.size() + 1 < then.size())
        return "more than one snapshot is gone";
    for (const auto &[name, disk] : now)
        if (const auto found = then.find(name); found == then.end() || !same_bytes(found->second, disk))
            return fmt::format("snapshot {} is not what it was", name);
    return std::nullopt;
}

std::optional<std::string> judge_bitmaps(std::span<const std::byte> image, std::span<const std::byte> before) {
    const auto now = Judge(image).bitmaps(), then = Judge(before).bitmaps();
    if (now.empty())
        return std::nullopt;
    if (now.size() != then.size())
        return "a bitmap is gone";
    for (std::size_t i = 0; i < now.size(); ++i) {
        if (now[i].flags & 1)
            continue;
        if (now[i].flags != then[i].flags)
            return fmt::format("bitmap {} has other flags", i);
        if (!(now[i].flags & 2)) {
            Bytes expected = then[i].stored; // a resize makes it longer
            expected.resize(std::max(expected.size(), now[i].stored.size()));
            if (now[i].stored != expected)
                return "a disabled bitmap changed";
            continue;
        }
        const Bytes disk = guest_bytes(image), old = guest_bytes(before);
        for (std::uint64_t at = 0; at < disk.size(); ++at)
            if (disk[at] != (at < old.size() ? old[at] : std::byte{0}) &&
                (now[i].stored[at / 512 / 8] >> at / 512 % 8 & std::byte{1}) == std::byte{0})
                return fmt::format("byte {} of the disk changed, and a consistent bitmap does not say so", at);
    }
    return std::nullopt;
}

bool has_consistent_bitmap(std::span<const std::byte> image) {
    for (const auto &b : Judge(image).bitmaps())
        if (b.flags == 2)
            return true;
    return false;
}

QemuVerdict ask_qemu(std::span<const std::byte> image) {
    QemuVerdict verdict;
    const char *directory = std::getenv("TMPDIR");
    std::string path = std::string(directory ? directory : "/tmp") + "/qlean-judge-XXXXXX";
    const int fd = ::mkstemp(path.data());
    if (fd == -1)
        return verdict;
    std::size_t done = 0;
    while (done < image.size()) {
        const ssize_t n = ::write(fd, image.data() + done, image.size() - done);
        if (n <= 0)
            break;
        done += static_cast<std::size_t>(n);
    }
    ::close(fd);
    const std::string command = "qemu-img check -f qcow2 '" + path + "' 2>&1";
    if (done == image.size())
        if (FILE *pipe = ::popen(command.c_str(), "r")) {
            char line[512];
            while (std::fgets(line, sizeof line, pipe))
                verdict.output += line;
            const int status = ::pclose(pipe);
            verdict.status = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
            verdict.available = verdict.status != 127;
        }
    ::unlink(path.c_str());
    return verdict;
}

} // namespace qlean::fault
