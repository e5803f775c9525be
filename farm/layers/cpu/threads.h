// Loops of one call shared among threads. OpenMP starts them; they meet by spinning, since a step of a small model has a
// hundred loops of microseconds each, and waking a thread costs more than that.
#pragma once

#include <atomic>
#include <cstdint>
#include <utility>
#ifdef _OPENMP
#include <omp.h>
#endif
#include <sched.h>

namespace farm {

// Below this much work a second thread costs more than it saves.
constexpr int64_t kWorkOfAThread = 1 << 15;
constexpr int kSpins = 4000;  // some ten microseconds, before the processor is offered to others

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// One of the threads that work on a call.
class Thread {
 public:
  Thread(std::atomic<int64_t>& arrivals, int index, int threads) : arrivals_(arrivals), index_(index), threads_(threads) {}

  int count() const { return threads_; }
  int index() const { return index_; }

  // This thread's share of 0..count - 1: the first, and the one behind the last.
  std::pair<int64_t, int64_t> share(int64_t count) const {
    return {count * index_ / threads_, count * (index_ + 1) / threads_};
  }

  // Calls body(i) for this thread's share and waits for the others'.
  template <class Body>
  void each(int64_t count, const Body& body) {
    const auto [first, end] = share(count);
    for (int64_t i = first; i < end; i++) body(i);
    meet();
  }

  // Waits until all threads have come as far.
  void meet() {
    if (threads_ == 1) return;
    expected_ += threads_;
    arrivals_.fetch_add(1, std::memory_order_acq_rel);
    for (int spins = 0; arrivals_.load(std::memory_order_acquire) < expected_; spins++)
      spins < kSpins ? pause() : (void)sched_yield();
  }

 private:
  std::atomic<int64_t>& arrivals_;
  const int index_, threads_;
  int64_t expected_ = 0;
};

// Runs body(thread) on each of `threads` threads, or on this one alone where the work is little.
template <class Body>
void share(int threads, int64_t work, const Body& body) {
  std::atomic<int64_t> arrivals{0};
#ifdef _OPENMP
  if (threads > 1 && work >= kWorkOfAThread) {
#pragma omp parallel num_threads(threads)
    {
      Thread thread(arrivals, omp_get_thread_num(), omp_get_num_threads());
      body(thread);
    }
    return;
  }
#endif
  Thread alone(arrivals, 0, 1);
  body(alone);
}

}  // namespace farm
