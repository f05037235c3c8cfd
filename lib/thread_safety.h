// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// A mutex that clang's -Wthread-safety understands (libstdc++'s is no capability to it), and words for declarations: a
// member that is PROTECTED_BY a mutex may be touched only where a Lock of it is held, a function that is WITH_LOCK must
// be called with it. To any other compiler all of this is std::mutex and std::unique_lock.
#pragma once

#include <condition_variable>
#include <mutex>

#ifdef __clang__
#define QLEAN_CAPABILITY(...) __attribute__((__VA_ARGS__))
#else
#define QLEAN_CAPABILITY(...)
#endif

#define PROTECTED_BY(mutex) QLEAN_CAPABILITY(guarded_by(mutex))
#define WITH_LOCK(mutex) QLEAN_CAPABILITY(requires_capability(mutex))
/// Where clang cannot know that two names are one mutex; say why beside it.
#define NOT_FOLLOWED QLEAN_CAPABILITY(no_thread_safety_analysis)

namespace qlean {

class QLEAN_CAPABILITY(capability("mutex")) Mutex {
    friend class Lock;
    std::mutex mutex_;
};

class QLEAN_CAPABILITY(scoped_lockable) Lock {
  public:
    explicit Lock(Mutex &mutex) QLEAN_CAPABILITY(acquire_capability(mutex)) : lock_(mutex.mutex_) {}
    ~Lock() QLEAN_CAPABILITY(release_capability()) = default;

    void lock() QLEAN_CAPABILITY(acquire_capability()) { lock_.lock(); }
    void unlock() QLEAN_CAPABILITY(release_capability()) { lock_.unlock(); }

    /// Lets go while it waits; may wake without a reason.
    void wait(std::condition_variable &until) { until.wait(lock_); }
    template <class Time>
    std::cv_status wait_until(std::condition_variable &until, Time latest) {
        return until.wait_until(lock_, latest);
    }

  private:
    std::unique_lock<std::mutex> lock_;
};

} // namespace qlean
