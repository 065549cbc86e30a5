#include "core/system.h"

#include <set>
#include <string>

#include "check.h"
#include "temp_folder.h"

namespace rapshee {
namespace {

using testing::TempFolder;

constexpr size_t kMiB = size_t{1} << 20;

// A machine with 1024 MiB available and 4 cores of 2 hardware threads each: (0, 4), (1, 5), ...
void write_machine(const TempFolder& root) {
  root.write("proc/meminfo", "MemTotal: 4194304 kB\nMemFree: 1 kB\nMemAvailable: 1048576 kB\n");
  for (int cpu = 0; cpu < 8; ++cpu) {
    const int core = cpu % 4;
    root.write(concat("sys/devices/system/cpu/cpu", cpu, "/topology/thread_siblings_list"),
               concat(core, ",", core + 4, "\n"));
  }
}

const std::set<int> kAllCpus = {0, 1, 2, 3, 4, 5, 6, 7};

TEST_CASE(a_machine_without_limits) {
  const TempFolder root;
  write_machine(root);
  CHECK_EQ(available_memory_under(root.path()), 1024 * kMiB);
  CHECK_EQ(usable_cores_under(root.path(), kAllCpus), 4);
}

TEST_CASE(affinity_counts_cores_not_hardware_threads) {
  const TempFolder root;
  write_machine(root);
  CHECK_EQ(usable_cores_under(root.path(), {1, 5}), 1);
  CHECK_EQ(usable_cores_under(root.path(), {1, 2, 5}), 2);
}

TEST_CASE(version_2_limits_of_the_group_and_its_ancestors) {
  const TempFolder root;
  write_machine(root);
  root.write("proc/self/cgroup", "0::/outer/inner\n");
  const std::string group = "sys/fs/cgroup/outer/inner/";
  root.write(group + "memory.max", "max\n");
  root.write(group + "cpu.max", "300000 100000\n");
  CHECK_EQ(available_memory_under(root.path()), 1024 * kMiB);
  CHECK_EQ(usable_cores_under(root.path(), kAllCpus), 3);

  const std::string outer = "sys/fs/cgroup/outer/";
  root.write(outer + "memory.max", concat(512 * kMiB, "\n"));
  root.write(outer + "memory.current", concat(300 * kMiB, "\n"));
  root.write(outer + "memory.stat", concat("anon 5\ninactive_file ", 100 * kMiB, "\n"));
  root.write(outer + "cpu.max", "250000 100000\n");
  CHECK_EQ(available_memory_under(root.path()), 312 * kMiB);
  CHECK_EQ(usable_cores_under(root.path(), kAllCpus), 2);
}

TEST_CASE(version_1_limits) {
  const TempFolder root;
  write_machine(root);
  root.write("proc/self/cgroup", "4:cpu,cpuacct:/job\n3:memory:/job\n0::/\n");
  const std::string memory = "sys/fs/cgroup/memory/job/";
  root.write(memory + "memory.limit_in_bytes", concat(64 * kMiB, "\n"));
  root.write(memory + "memory.usage_in_bytes", concat(24 * kMiB, "\n"));
  root.write("sys/fs/cgroup/cpu/job/cpu.cfs_quota_us", "100000\n");
  root.write("sys/fs/cgroup/cpu/job/cpu.cfs_period_us", "100000\n");
  CHECK_EQ(available_memory_under(root.path()), 40 * kMiB);
  CHECK_EQ(usable_cores_under(root.path(), kAllCpus), 1);

  root.write("sys/fs/cgroup/cpu/job/cpu.cfs_quota_us", "-1\n");  // no quota
  CHECK_EQ(usable_cores_under(root.path(), kAllCpus), 4);
}

TEST_CASE(a_group_over_its_limit_leaves_nothing) {
  const TempFolder root;
  write_machine(root);
  root.write("proc/self/cgroup", "0::/\n");
  root.write("sys/fs/cgroup/memory.max", "1000\n");
  root.write("sys/fs/cgroup/memory.current", "2000\n");
  root.write("sys/fs/cgroup/cpu.max", "10000 100000\n");
  CHECK_EQ(available_memory_under(root.path()), 0u);
  CHECK_EQ(usable_cores_under(root.path(), kAllCpus), 1);
}

TEST_CASE(a_system_that_says_nothing) {
  const TempFolder root;
  CHECK_EQ(usable_cores_under(root.path(), {0, 1}), 2);
  CHECK_EQ(usable_cores_under(root.path(), {}), 1);
}

TEST_CASE(this_machine) {
  CHECK(available_memory() > 0);
  CHECK(usable_cores() >= 1);
}

}  // namespace
}  // namespace rapshee

TEST_MAIN()
