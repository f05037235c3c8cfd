// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// A QCOW2 image as a disk: read, write, zero, trim, flush, extents. Offsets and lengths are guest bytes at any
// alignment; [at, at + length) must lie inside the disk. Every member may be called from any number of threads at
// once, except close(). Errors are thrown as Error; an operation that throws has lost nothing that was acknowledged.
//
// A write is durable after a flush() that was called after it returned.
#pragma once

#include "check/report.h"
#include "rw_lock.h"
#include "secret.h"
#include "state.h"
#include "subclusters.h"
#include "thread_safety.h"

#include <functional>
#include <list>
#include <memory>
#include <span>
#include <string>
#include <thread>

namespace qlean {

class Image {
  public:
    struct Options {
        bool read_only = false;
        /// Bytes of L2 tables to keep in memory.
        std::uint64_t cache_bytes = 64 * 1024 * 1024;
        /// For an image that is opened as the backing file of another: that one.
        const ChainLink *above = nullptr;
        /// What to repair before the image is served for writing. Nothing here: what QEMU does, a dirty image is
        /// repaired.
        std::optional<Repair> repair;
        /// The external data file, if the image has one; empty: as the image says.
        std::string data_file;
        /// For an encrypted image; may be null.
        std::shared_ptr<const Secret> passphrase;
        /// Gives the data file, for an image that is not opened by its path.
        std::function<std::unique_ptr<File>(const Header &)> open_data;
    };

    /// Opens, locks (as QEMU does) and judges the image at `path`. Nothing of it is changed, unless it is repaired.
    static std::unique_ptr<Image> open(const std::string &path, const Options &options);
    /// Opens an image in any File, without locks: the seam for tests.
    static std::unique_ptr<Image> open(std::unique_ptr<File> file, const Options &options);
    ~Image();

    std::uint64_t size() const { return state_.geometry.virtual_size(); }
    const Geometry &geometry() const { return state_.geometry; }
    bool read_only() const { return state_.read_only; }

    void read(std::span<std::byte> into, GuestOffset at);
    void write(std::span<const std::byte> from, GuestOffset at);

    enum class Zero { keep_space, may_trim };
    /// Makes the range read as zeroes. With `fast`, throws Error with ENOTSUP instead of writing zeroes out.
    void zero(GuestOffset at, std::uint64_t length, Zero how, bool fast);
    /// Gives back what the range occupies: whole clusters become unallocated (zero clusters, where something lies below
    /// the image), the rest is punched where the host can. Each byte of the range reads as it was or as zero after;
    /// never as what lies below. Never fails for its alignment.
    void trim(GuestOffset at, std::uint64_t length);
    void flush();
    /// Makes the disk larger; what is new reads as zeroes. No request, operation or walk may be under way, and none of
    /// the operations that exist may go on afterwards. Throws Error, with the disk as it was, if that cannot be.
    void resize(std::uint64_t size);
    /// Throws Error if the disk cannot have that size: what resize() refuses before it changes anything.
    void require_resizable(std::uint64_t size) const;

    struct Extent {
        GuestOffset at;
        std::uint64_t length;
        bool allocated; ///< has a host cluster
        bool zero;      ///< reads as zeroes
    };
    /// The extents of the range, ascending, adjacent equal ones joined, at most `most` of them.
    std::vector<Extent> extents(GuestOffset at, std::uint64_t length, std::size_t most);
    /// Asks the host to read the range ahead.
    void prefetch(GuestOffset at, std::uint64_t length);

    /// Commits every few seconds and punches in the background. To be started where threads may be (after a fork).
    void start_housekeeping();
    /// Commits, gives back everything, shortens the file by its free tail. Nothing else may be running or follow; an
    /// operation may still exist.
    void close();

    /// Called with errors that happen in the background.
    void on_background_error(std::function<void(const std::exception &)> report);

    /// Called once, when the image becomes poisoned.
    void on_poison(std::function<void()> call);

    /// While it exists, close() begins with this call: for who has something reserved that a clean end gives back. It
    /// may outlive the image, and does where a client is still connected when the server ends.
    class BeforeClose {
      public:
        BeforeClose(Image &image, std::function<void()> call);
        ~BeforeClose();
        BeforeClose(const BeforeClose &) = delete;
        BeforeClose &operator=(const BeforeClose &) = delete;

      private:
        friend class Image;
        struct Calls {
            Mutex mutex;
            std::list<std::function<void()>> list PROTECTED_BY(mutex);
        };
        std::shared_ptr<Calls> calls_;
        std::list<std::function<void()>>::iterator here_;
    };

    /// For the maintenance operations.
    State &state() { return state_; }
    /// Commits, giving back, and punches what came free. Nothing once it has been closed.
    void give_back();

  private:
    void punch();
    void report(const std::exception &error) const;
    explicit Image(std::unique_ptr<State> state);

    /// The most that one guard of the range lock covers: bounds how long a request keeps others out.
    static constexpr std::uint64_t data_chunk = 2 * 1024 * 1024;
    static constexpr std::uint64_t unmap_chunk_bytes = 32 * 1024 * 1024;

    enum class Outcome { done, commit_first };
    void with_room(const std::function<Outcome(Allocator::Growth)> &change);
    /// Where a cluster goes.
    struct Place {
        HostCluster host;
        bool moves; ///< it is another host cluster than before
        bool zero;  ///< the host reads zeroes there
    };
    std::optional<std::vector<Place>> places_for(GuestCluster first, std::span<const Mapping> mappings,
                                                 Allocator::Growth growth, Allocator::Reservation &reserved);
    Place place_in_data_file(GuestCluster c);
    using Fill = std::function<void(const std::vector<Mapping> &, const std::vector<Place> &)>;
    using Store = std::function<void(Mapper::Editor &, GuestCluster, const Mapping &, const Place &)>;
    Outcome write_placed(GuestOffset at, std::uint64_t length, Allocator::Growth growth, const Fill &fill,
                         const Store &store);
    bool is_own_data(const Mapping &m, std::uint64_t within, std::uint64_t length) const;
    Outcome write_chunk(std::span<const std::byte> from, GuestOffset at, Allocator::Growth growth);
    bool write_in_place(std::span<const std::byte> from, GuestOffset at);
    /// A trim is a hint, and leaves what it cannot give back; zeroing is a promise, and fails.
    enum class Unmap { hint, promise };
    void unmap(GuestOffset at, std::uint64_t length, Unmap how, bool fast);
    Outcome unmap_chunk(GuestOffset at, std::uint64_t length, Unmap how, Allocator::Growth growth);
    void write_zeroes(GuestOffset at, std::uint64_t length);
    void zero_keeping_space(GuestOffset at, std::uint64_t length, bool fast);
    void trim_edge(GuestOffset at, std::uint64_t length);
    void zero_edge(GuestOffset at, std::uint64_t length, Zero how, bool fast);
    void zero_raw(GuestOffset at, std::uint64_t length, Zero how, bool fast);
    void zero_host(HostOffset at, std::uint64_t length, Zero how, bool fast);

    // Images with extended L2 entries: image_subclusters.cpp.
    Outcome write_subclusters(std::span<const std::byte> from, GuestOffset at, Allocator::Growth growth);
    subclusters::Bitmap fill_subclusters(GuestCluster c, const Mapping &m, const Place &place, std::uint64_t within,
                                         std::span<const std::byte> bytes);
    Outcome zero_subclusters_keeping_space(GuestOffset at, std::uint64_t length, Allocator::Growth growth);
    void zero_subclusters(GuestOffset at, std::uint64_t length, Zero how, bool fast);
    Outcome zero_subclusters_in(GuestOffset at, std::uint64_t length, Zero how, bool fast, Allocator::Growth growth,
                                std::vector<subclusters::Piece> &to_write);
    void trim_subclusters(GuestOffset at, std::uint64_t length);
    Outcome give_up_subclusters(GuestCluster c, const Mapping &m, subclusters::Set gone, bool keep_host,
                                subclusters::Piece trimmed);
    std::uint64_t covering_length(GuestOffset at, std::uint64_t length) const;

    /// Splits [at, at+length) into an unaligned head, whole clusters, and an unaligned tail.
    template <class Edge, class Middle>
    void split(GuestOffset at, std::uint64_t length, Edge &&edge, Middle &&middle);

    void before_change(GuestOffset at, std::uint64_t length);
    void keep_house();
    void stop_housekeeping();
    void hook_up();
    void make_anew(std::uint64_t size);
    void zero_beyond(std::uint64_t old_size);
    bool store_bitmaps();

    std::unique_ptr<State> owner_;
    State &state_;
    std::function<void(const std::exception &)> report_;
    std::function<void()> poison_;

    const std::shared_ptr<BeforeClose::Calls> before_close_ = std::make_shared<BeforeClose::Calls>();
    RwLock open_; // shared by whoever gives back
    bool closed_ = false;
    Mutex house_mutex_;
    std::condition_variable house_wakes_;
    bool house_stops_ PROTECTED_BY(house_mutex_) = false;
    std::thread house_;
};

} // namespace qlean
