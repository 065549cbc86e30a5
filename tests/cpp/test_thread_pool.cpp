#include "core/thread_pool.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "core/error.h"

namespace rapshee {
namespace {

// Runs tasks that count themselves in plain memory, so that a task that runs twice, or a write
// that the caller does not see, shows (the latter under a thread sanitizer as well).
void check_each_task_runs_once(ThreadPool& pool, int num_tasks, int num_threads) {
  std::vector<int> runs(static_cast<size_t>(num_tasks), 0);
  std::atomic<int> wrong_worker{0};
  pool.run(num_tasks, num_threads, [&](int task, int worker) {
    if (worker < 0 || worker >= num_threads) ++wrong_worker;
    ++runs[static_cast<size_t>(task)];
  });
  CHECK_EQ(wrong_worker.load(), 0);
  CHECK(std::all_of(runs.begin(), runs.end(), [](int count) { return count == 1; }));
}

TEST_CASE(each_task_runs_once) {
  for (const int threads : {1, 2, 4}) {
    ThreadPool pool(threads);
    CHECK_EQ(pool.size(), threads);
    const ThreadPool::StepGuard turn = pool.lock();
    for (const int tasks : {0, 1, 2, 3, 7, 64, 1000}) {
      for (int used = 1; used <= threads; ++used) check_each_task_runs_once(pool, tasks, used);
    }
  }
}

// Many short jobs, one after the other, on more threads than cores: workers are late for most of
// them, and each job's closure is gone when the next one starts.
TEST_CASE(late_workers_never_touch_a_job_that_has_ended) {
  ThreadPool pool(6);
  const ThreadPool::StepGuard turn = pool.lock();
  for (int job = 0; job < 5000; ++job) {
    const int tasks = 1 + job % 9;
    auto results = std::make_unique<std::vector<int>>(static_cast<size_t>(tasks), -1);
    pool.run(tasks, 1 + job % 6,
             [&, job](int task, int) { (*results)[static_cast<size_t>(task)] = job + task; });
    for (int task = 0; task < tasks; ++task) {
      CHECK_EQ((*results)[static_cast<size_t>(task)], job + task);
    }
  }
}

TEST_CASE(several_threads_take_part) {
  ThreadPool pool(2);
  const ThreadPool::StepGuard turn = pool.lock();
  // Both tasks wait for each other: this ends only if two threads run them.
  std::atomic<int> arrived{0};
  std::array<int, 2> workers{};
  pool.run(2, 2, [&](int task, int worker) {
    ++arrived;
    while (arrived.load() < 2) std::this_thread::yield();
    workers[static_cast<size_t>(task)] = worker;
  });
  CHECK_EQ(workers[0] + workers[1], 1);
}

TEST_CASE(the_first_exception_reaches_the_caller) {
  for (const int threads : {1, 4}) {
    ThreadPool pool(threads);
    const ThreadPool::StepGuard turn = pool.lock();
    for (int job = 0; job < 300; ++job) {
      const std::string message =
          MESSAGE_OF(std::runtime_error, pool.run(16, threads, [&](int task, int) {
            if (task % 4 == 1) throw std::runtime_error("job " + std::to_string(job));
          }));
      CHECK_EQ(message, "job " + std::to_string(job));
      check_each_task_runs_once(pool, 16, threads);
    }
  }
}

TEST_CASE(tasks_after_an_exception_are_dropped) {
  ThreadPool pool(1);
  int ran = 0;
  CHECK(!MESSAGE_OF(std::runtime_error, pool.run(10, 1, [&](int task, int) {
           ++ran;
           if (task == 2) throw std::runtime_error("stop");
         })).empty());
  CHECK_EQ(ran, 3);
}

TEST_CASE(a_task_cannot_run_tasks) {
  for (const int threads : {1, 2}) {
    ThreadPool pool(threads);
    const ThreadPool::StepGuard turn = pool.lock();
    const std::string message =
        MESSAGE_OF(InvalidArgument,
                   pool.run(4, threads, [&](int, int) { pool.run(2, threads, [](int, int) {}); }));
    CHECK(message.find("inside a task") != std::string::npos);
    check_each_task_runs_once(pool, 8, threads);
  }
}

TEST_CASE(arguments_are_checked) {
  ThreadPool pool(2);
  const auto nothing = [](int, int) {};
  CHECK(!MESSAGE_OF(InvalidArgument, pool.run(-1, 1, nothing)).empty());
  CHECK(!MESSAGE_OF(InvalidArgument, pool.run(1, 0, nothing)).empty());
  CHECK(!MESSAGE_OF(InvalidArgument, pool.run(1, 3, nothing)).empty());
  CHECK(!MESSAGE_OF(InvalidArgument, ThreadPool(0)).empty());
  CHECK(!MESSAGE_OF(InvalidArgument, ThreadPool(ThreadPool::kMaxThreads + 1)).empty());
}

TEST_CASE(sleeping_workers_wake_up) {
  ThreadPool pool(2);
  const ThreadPool::StepGuard turn = pool.lock();
  for (int round = 0; round < 50; ++round) {
    // Longer or shorter than a worker stays awake, so that jobs meet it in each of its states.
    std::this_thread::sleep_for(std::chrono::microseconds(100 * (round % 25)));
    std::atomic<int> arrived{0};
    pool.run(2, 2, [&](int, int) {
      ++arrived;
      while (arrived.load() < 2) std::this_thread::yield();
    });
    CHECK_EQ(arrived.load(), 2);
  }
}

TEST_CASE(steps_take_turns) {
  ThreadPool pool(2);
  int inside = 0;
  int most = 0;
  std::vector<std::thread> engines;
  for (int engine = 0; engine < 4; ++engine) {
    engines.emplace_back([&] {
      for (int step = 0; step < 200; ++step) {
        const ThreadPool::StepGuard turn = pool.lock();
        most = std::max(most, ++inside);
        std::array<int, 8> sum{};
        pool.run(8, 2, [&](int task, int) { sum[static_cast<size_t>(task)] += task; });
        --inside;
      }
    });
  }
  for (std::thread& engine : engines) engine.join();
  CHECK_EQ(most, 1);
}

TEST_CASE(the_process_has_one_pool_that_grows_and_ends) {
  std::shared_ptr<ThreadPool> first = ThreadPool::process_pool(2);
  const std::shared_ptr<ThreadPool> second = ThreadPool::process_pool(4);
  CHECK(first == second);
  CHECK_EQ(first->size(), 4);
  CHECK(ThreadPool::process_pool(1) == first);
  CHECK_EQ(first->size(), 4);
  {
    const ThreadPool::StepGuard turn = first->lock();
    check_each_task_runs_once(*first, 100, 4);
  }
}

TEST_CASE(the_pool_ends_with_its_last_user) {
  const std::weak_ptr<ThreadPool> gone = ThreadPool::process_pool(3);
  CHECK(gone.expired());
  CHECK_EQ(ThreadPool::process_pool(2)->size(), 2);
}

TEST_CASE(pools_grow_while_others_work) {
  const std::shared_ptr<ThreadPool> pool = ThreadPool::process_pool(2);
  std::thread engine([&] {
    for (int step = 0; step < 300; ++step) {
      const ThreadPool::StepGuard turn = pool->lock();
      check_each_task_runs_once(*pool, 16, 2);
    }
  });
  for (int threads = 3; threads <= 8; ++threads) {
    CHECK_EQ(ThreadPool::process_pool(threads)->size(), threads);
  }
  engine.join();
}

}  // namespace
}  // namespace rapshee

TEST_MAIN()
