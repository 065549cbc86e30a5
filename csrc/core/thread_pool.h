// Worker threads of the process, shared by all engines.
#pragma once

#include <signal.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <type_traits>
#include <vector>

namespace rapshee {

// Threads started in its lifetime take no signals: those belong to the host's own threads.
class SignalsBlocked {
 public:
  SignalsBlocked();
  ~SignalsBlocked();
  SignalsBlocked(const SignalsBlocked&) = delete;
  SignalsBlocked& operator=(const SignalsBlocked&) = delete;

 private:
  sigset_t before_;
};

// Runs data-parallel loops. Whatever the number of threads, a loop is cut into the same tasks;
// threads claim them one by one, so a thread that gets no processor time costs nothing.
//
// Workers that wait spin for some microseconds, then yield, then sleep: without work the pool takes
// no processor time.
class ThreadPool {
 public:
  static constexpr int kMaxThreads = 1024;

  // Whose turn it is. Destruction passes the turn on.
  class [[nodiscard]] StepGuard {
   public:
    explicit StepGuard(ThreadPool& pool);
    ~StepGuard();
    StepGuard(const StepGuard&) = delete;
    StepGuard& operator=(const StepGuard&) = delete;

   private:
    ThreadPool& pool_;
  };

  // The pool of this process, with at least `threads` threads (the caller of run() counts as one).
  // It lives as long as somebody holds it. Throws DeviceError if the system gives no thread.
  // Waits for its turn if the pool has to grow, so it is not called with the turn held.
  static std::shared_ptr<ThreadPool> process_pool(int threads);

  // A pool of its own, for tests.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // Threads, the caller of run() included.
  int size() const noexcept { return size_.load(std::memory_order_relaxed); }

  // Waits for this caller's turn: first come, first served. run() is called with the turn held.
  StepGuard lock() { return StepGuard(*this); }

  // Calls fn(task, worker) for each task in [0, num_tasks), from at most `num_threads` threads
  // (at most size()). `worker` in [0, num_threads) tells threads apart for scratch memory; the
  // caller works too, as worker 0. Returns when all tasks are done; what they wrote is then
  // visible to the caller.
  //
  // Once a task has thrown, tasks not yet begun are dropped, and the first exception is rethrown.
  // Throws InvalidArgument when called from inside a task, or with arguments out of range.
  template <class F>
  void run(int num_tasks, int num_threads, F&& fn) {
    using Fn = std::remove_reference_t<F>;
    run_erased(
        num_tasks, num_threads,
        {[](void* context, int task, int worker) { (*static_cast<Fn*>(context))(task, worker); },
         const_cast<void*>(static_cast<const volatile void*>(std::addressof(fn)))});
  }

 private:
  struct Function {
    void (*call)(void* context, int task, int worker) = nullptr;
    void* context = nullptr;
  };
  struct Worker;

  void grow(int threads);
  void stop() noexcept;
  void run_erased(int num_tasks, int num_threads, Function fn);
  void run_inline(int num_tasks, const Function& fn);
  void run_shared(int num_tasks, int num_threads, const Function& fn);
  bool claim(int worker, int& remaining) noexcept;
  bool work(int worker) noexcept;
  bool wanted(int worker, std::memory_order order) const noexcept;
  void worker_loop(Worker& self) noexcept;
  bool wait_for_work(Worker& self) noexcept;
  void wake(Worker& worker) noexcept;

  // (threads of the job) << 32 | (tasks not yet claimed). One word decides who may take a task, so
  // a thread that comes late finds either nothing or a task of the job that is running now.
  alignas(64) std::atomic<uint64_t> open_{0};
  // Tasks that are not finished. A job stands until it is 0: whoever holds an unfinished task may
  // read the job's fields below without further care.
  alignas(64) std::atomic<int> unfinished_{0};
  alignas(64) Function fn_;
  int num_tasks_ = 0;
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;  // written by the thread that set failed_

  alignas(64) std::atomic<uint32_t> next_turn_{0};
  std::atomic<uint32_t> turn_{0};
  std::atomic<int> size_{1};
  std::atomic<bool> stopping_{false};
  std::vector<std::unique_ptr<Worker>> workers_;  // changed only by who has the turn
};

}  // namespace rapshee
