#include "core/thread_pool.h"

#include <pthread.h>
#include <signal.h>

#include <chrono>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

#include "core/error.h"

namespace rapshee {
namespace {

using Clock = std::chrono::steady_clock;

// The serial code between two parallel loops of a step takes a few microseconds; between two steps
// the engine works for some hundreds. Waking a sleeper costs tens of microseconds.
constexpr std::chrono::microseconds kSpin{50};
constexpr std::chrono::microseconds kYield{1000};
constexpr int kPausesPerLook = 32;     // between two looks at the clock
constexpr int kPausesAtTheEnd = 2000;  // a caller waits for the last task so long before it yields

constexpr uint64_t kRemainingMask = 0xffffffffu;

constexpr uint64_t pack(int num_threads, int remaining) {
  return static_cast<uint64_t>(num_threads) << 32 | static_cast<uint32_t>(remaining);
}

inline void pause() noexcept {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Marks the thread as inside a task, which is where run() must not be called.
class TaskScope {
 public:
  TaskScope() {
    RAPSHEE_CHECK(!active_, "run() was called from inside a task of the thread pool");
    active_ = true;
  }
  ~TaskScope() { active_ = false; }
  TaskScope(const TaskScope&) = delete;
  TaskScope& operator=(const TaskScope&) = delete;

 private:
  static thread_local bool active_;
};

thread_local bool TaskScope::active_ = false;

}  // namespace

SignalsBlocked::SignalsBlocked() {
  sigset_t all;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before_);
}

SignalsBlocked::~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

struct alignas(64) ThreadPool::Worker {
  explicit Worker(int index) : index(index) {}
  const int index;
  std::atomic<uint32_t> asleep{0};  // 1: the thread is, or is about to be, blocked on this word
  std::thread thread;
};

ThreadPool::StepGuard::StepGuard(ThreadPool& pool) : pool_(pool) {
  const uint32_t mine = pool_.next_turn_.fetch_add(1, std::memory_order_relaxed);
  for (;;) {
    const uint32_t turn = pool_.turn_.load(std::memory_order_acquire);
    if (turn == mine) return;
    pool_.turn_.wait(turn, std::memory_order_acquire);
  }
}

ThreadPool::StepGuard::~StepGuard() {
  pool_.turn_.fetch_add(1, std::memory_order_seq_cst);
  pool_.turn_.notify_all();
}

std::shared_ptr<ThreadPool> ThreadPool::process_pool(int threads) {
  static std::mutex mutex;
  static std::weak_ptr<ThreadPool> current;
  const std::lock_guard<std::mutex> lock(mutex);
  std::shared_ptr<ThreadPool> pool = current.lock();
  if (pool == nullptr) {
    pool = std::make_shared<ThreadPool>(threads);
    current = pool;
  } else {
    pool->grow(threads);
  }
  return pool;
}

ThreadPool::ThreadPool(int threads) {
  try {
    grow(threads);
  } catch (...) {
    stop();
    throw;
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::grow(int threads) {
  RAPSHEE_CHECK(threads >= 1 && threads <= kMaxThreads, "threads: got ", threads,
                ", expected 1 to ", kMaxThreads);
  if (size() >= threads) return;
  const StepGuard turn = lock();
  const SignalsBlocked blocked;
  while (size() < threads) {
    auto worker = std::make_unique<Worker>(size());
    Worker& self = *worker;
    workers_.reserve(workers_.size() + 1);  // so that a started thread always has its owner
    try {
      self.thread = std::thread([this, &self] { worker_loop(self); });
    } catch (const std::system_error& error) {
      throw DeviceError(concat("cannot start worker thread ", self.index, " of ", threads, ": ",
                               error.what(), "; use fewer threads"));
    }
    workers_.push_back(std::move(worker));
    size_.fetch_add(1, std::memory_order_relaxed);
  }
}

void ThreadPool::stop() noexcept {
  stopping_.store(true, std::memory_order_seq_cst);
  for (const auto& worker : workers_) wake(*worker);
  for (const auto& worker : workers_) worker->thread.join();
}

void ThreadPool::run_erased(int num_tasks, int num_threads, Function fn) {
  RAPSHEE_CHECK(num_tasks >= 0, "num_tasks: got ", num_tasks);
  RAPSHEE_CHECK(num_threads >= 1 && num_threads <= size(), "num_threads: got ", num_threads,
                ", expected 1 to ", size());
  const TaskScope scope;
  if (num_threads > num_tasks) num_threads = num_tasks;
  if (num_threads <= 1) {
    run_inline(num_tasks, fn);
  } else {
    run_shared(num_tasks, num_threads, fn);
  }
}

void ThreadPool::run_inline(int num_tasks, const Function& fn) {
  for (int task = 0; task < num_tasks; ++task) fn.call(fn.context, task, 0);
}

void ThreadPool::run_shared(int num_tasks, int num_threads, const Function& fn) {
  fn_ = fn;
  num_tasks_ = num_tasks;
  failed_.store(false, std::memory_order_relaxed);
  unfinished_.store(num_tasks, std::memory_order_relaxed);
  // Publishes the fields above. Sequentially consistent against wait_for_work(): either the worker
  // sees the job, or the job's owner sees that the worker is asleep.
  open_.store(pack(num_threads, num_tasks), std::memory_order_seq_cst);
  for (int worker = 1; worker < num_threads; ++worker) {
    Worker& other = *workers_[static_cast<size_t>(worker - 1)];
    if (other.asleep.load(std::memory_order_seq_cst) != 0) wake(other);
  }
  work(0);
  for (int pauses = 0; unfinished_.load(std::memory_order_acquire) != 0;) {
    if (++pauses < kPausesAtTheEnd) {
      pause();
    } else {
      std::this_thread::yield();
    }
  }
  if (failed_.load(std::memory_order_relaxed)) {
    std::rethrow_exception(std::exchange(error_, nullptr));
  }
}

// Takes a task of the open job. `remaining` is how many there were, this one included.
bool ThreadPool::claim(int worker, int& remaining) noexcept {
  uint64_t open = open_.load(std::memory_order_relaxed);
  for (;;) {
    remaining = static_cast<int>(open & kRemainingMask);
    if (remaining == 0 || worker >= static_cast<int>(open >> 32)) return false;
    // Acquires what the job's owner published, through the claims made in between.
    if (open_.compare_exchange_weak(open, open - 1, std::memory_order_acquire,
                                    std::memory_order_relaxed)) {
      return true;
    }
  }
}

// Runs tasks until none is left to claim; whether there was one. What it ran is counted at the end:
// until then the job cannot end, so all claims of one call belong to one job.
bool ThreadPool::work(int worker) noexcept {
  int done = 0;
  for (int remaining = 0; claim(worker, remaining); ++done) {
    if (failed_.load(std::memory_order_relaxed)) continue;
    try {
      fn_.call(fn_.context, num_tasks_ - remaining, worker);
    } catch (...) {
      if (!failed_.exchange(true, std::memory_order_relaxed)) error_ = std::current_exception();
    }
  }
  if (done > 0) unfinished_.fetch_sub(done, std::memory_order_release);
  return done > 0;
}

bool ThreadPool::wanted(int worker, std::memory_order order) const noexcept {
  const uint64_t open = open_.load(order);
  return (open & kRemainingMask) != 0 && worker < static_cast<int>(open >> 32);
}

void ThreadPool::worker_loop(Worker& self) noexcept {
  const TaskScope scope;
  pthread_setname_np(pthread_self(), "rapshee-worker");
  while (wait_for_work(self)) work(self.index);
}

// Returns when there may be a task to claim, or false when the pool ends.
bool ThreadPool::wait_for_work(Worker& self) noexcept {
  const Clock::time_point start = Clock::now();
  for (;;) {
    for (int i = 0; i < kPausesPerLook; ++i) {
      if (wanted(self.index, std::memory_order_relaxed)) return true;
      pause();
    }
    if (stopping_.load(std::memory_order_relaxed)) return false;
    const auto waited = Clock::now() - start;
    if (waited > kYield) break;
    if (waited > kSpin) std::this_thread::yield();
  }
  self.asleep.store(1, std::memory_order_seq_cst);
  if (!wanted(self.index, std::memory_order_seq_cst) &&
      !stopping_.load(std::memory_order_seq_cst)) {
    self.asleep.wait(1, std::memory_order_relaxed);
  }
  self.asleep.store(0, std::memory_order_relaxed);
  return true;
}

void ThreadPool::wake(Worker& worker) noexcept {
  worker.asleep.store(0, std::memory_order_seq_cst);
  worker.asleep.notify_one();
}

}  // namespace rapshee
