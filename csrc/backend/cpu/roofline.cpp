#include "backend/cpu/roofline.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>

#include "core/memory.h"
#include "core/thread_pool.h"

namespace rapshee::cpu {
namespace {

// A limit is the best of several tries: other processes only ever take away.
constexpr int kTries = 20;
// Short tasks, so that a thread that wakes late or loses its core leaves the rest to the others.
constexpr int kTasksPerThread = 16;
// About 0.3 ms a task at 100 GFLOP/s with 12 accumulators: long beside the hand-over of a task.
constexpr int64_t kPeakSteps = 80'000;
// Bytes read in a try, at least: some milliseconds at 100 GB/s.
constexpr size_t kReadBytes = size_t{1} << 28;

// Seconds of the fastest of several runs of `tasks` tasks.
template <class F>
double fastest(int threads, int tasks, F task) {
  const auto pool = ThreadPool::process_pool(threads);
  const auto turn = pool->lock();
  double best = 0.0;
  for (int i = 0; i < kTries; ++i) {
    const auto start = std::chrono::steady_clock::now();
    pool->run(tasks, threads, task);
    const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
    best = i == 0 ? time.count() : std::min(best, time.count());
  }
  return best;
}

// Takes results that nobody wants, so that they are computed.
class Sink {
 public:
  void take(float value) { value_.store(value, std::memory_order_relaxed); }

 private:
  std::atomic<float> value_{0.0f};
};

}  // namespace

double measure_read(const KernelTable& kernels, int threads, size_t bytes) {
  const int tasks = threads * kTasksPerThread;
  // Whole steps of sum_floats for each task.
  const int64_t floats = round_up(static_cast<int64_t>(bytes / sizeof(float)) / tasks, 8 * kLanes);
  AlignedBuffer memory(static_cast<size_t>(floats * tasks) * sizeof(float));
  // Pages that were never written are all the same page of zeros.
  std::ranges::fill(memory.as<float>(), 1.0f);
  const int repeats = static_cast<int>(std::max<size_t>(1, kReadBytes / memory.size()));
  Sink sink;
  const double seconds = fastest(threads, tasks * repeats, [&](int task, int) {
    sink.take(kernels.sum_floats(memory.as<float>().data() + task % tasks * floats, floats));
  });
  return static_cast<double>(memory.size()) * repeats / seconds;
}

double measure_peak(const KernelTable& kernels, int threads, PeakKind kind) {
  const int tasks = threads * kTasksPerThread;
  Sink sink;
  std::atomic<int64_t> operations_of_a_task{0};
  const double seconds = fastest(threads, tasks, [&](int, int) {
    int64_t operations = 0;
    sink.take(kernels.run_peak(kind, kPeakSteps, &operations));
    operations_of_a_task.store(operations, std::memory_order_relaxed);
  });
  return static_cast<double>(operations_of_a_task.load()) * tasks / seconds;
}

}  // namespace rapshee::cpu
