#include "core/system.h"

#include <sched.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <optional>
#include <sstream>
#include <string_view>
#include <vector>

namespace rapshee {
namespace {

constexpr uint64_t kUnlimited = std::numeric_limits<uint64_t>::max();

// The first word of a file as a number; nothing for "max", -1 and files that are not there.
std::optional<uint64_t> read_number(const std::string& path) {
  std::ifstream file(path);
  int64_t value = 0;
  if (!(file >> value) || value < 0) return std::nullopt;
  return static_cast<uint64_t>(value);
}

// The number after `key` in a file of lines "key value ...".
std::optional<uint64_t> read_field(const std::string& path, std::string_view key) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string name;
    uint64_t value = 0;
    if (words >> name >> value && name == key) return value;
  }
  return std::nullopt;
}

bool lists(const std::string& names, std::string_view wanted) {
  std::istringstream parts(names);
  for (std::string name; std::getline(parts, name, ',');) {
    if (name == wanted) return true;
  }
  return false;
}

// The process's group and its ancestors as folders, innermost first. Inside a container the path
// that the kernel reports may not exist below the mount: folders without the files yield nothing.
std::vector<std::string> with_ancestors(const std::string& mount, std::string group) {
  std::vector<std::string> folders;
  while (group.size() > 1) {
    folders.push_back(mount + group);
    const size_t slash = group.rfind('/');
    group.resize(slash == std::string::npos ? 0 : slash);
  }
  folders.push_back(mount);
  return folders;
}

// Folders of the groups that govern `controller`; `version` says which files they hold.
struct Cgroup {
  int version = 2;
  std::vector<std::string> folders;
};

std::vector<Cgroup> cgroups(const std::string& root, const std::string& controller) {
  std::vector<Cgroup> found;
  std::ifstream file(root + "/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {  // hierarchy:controllers:path
    const size_t first = line.find(':');
    const size_t second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const std::string group = line.substr(second + 1);
    if (controllers.empty()) {
      found.push_back({2, with_ancestors(root + "/sys/fs/cgroup", group)});
    } else if (lists(controllers, controller)) {
      found.push_back({1, with_ancestors(root + "/sys/fs/cgroup/" + controller, group)});
    }
  }
  return found;
}

// What a group leaves: its limit less what it holds. Page cache that can be dropped is not held.
uint64_t memory_left(const std::string& folder, int version) {
  const bool v2 = version == 2;
  const auto limit = read_number(folder + (v2 ? "/memory.max" : "/memory.limit_in_bytes"));
  if (!limit) return kUnlimited;
  const uint64_t used =
      read_number(folder + (v2 ? "/memory.current" : "/memory.usage_in_bytes")).value_or(0);
  const uint64_t cache =
      read_field(folder + "/memory.stat", v2 ? "inactive_file" : "total_inactive_file").value_or(0);
  const uint64_t held = used - std::min(used, cache);
  return *limit - std::min(*limit, held);
}

// Cores' worth of time that a group may use.
uint64_t cores_allowed(const std::string& folder, int version) {
  std::optional<uint64_t> quota;
  std::optional<uint64_t> period;
  if (version == 2) {
    std::ifstream file(folder + "/cpu.max");  // "max 100000" or "200000 100000", microseconds
    std::string first;
    uint64_t second = 0;
    if (file >> first >> second && first != "max") {
      quota = std::strtoull(first.c_str(), nullptr, 10);
      period = second;
    }
  } else {
    quota = read_number(folder + "/cpu.cfs_quota_us");
    period = read_number(folder + "/cpu.cfs_period_us");
  }
  if (!quota || !period || *period == 0) return kUnlimited;
  return *quota / *period;
}

// The least that any group of the process yields.
template <class F>
uint64_t least(const std::string& root, const std::string& controller, F&& yields) {
  uint64_t value = kUnlimited;
  for (const Cgroup& cgroup : cgroups(root, controller)) {
    for (const std::string& folder : cgroup.folders) {
      value = std::min<uint64_t>(value, yields(folder, cgroup.version));
    }
  }
  return value;
}

// Hardware threads of one core share a core. A CPU without a topology file counts by itself.
uint64_t physical_cores(const std::string& root, const std::set<int>& cpus) {
  std::set<std::string> cores;
  for (const int cpu : cpus) {
    const std::string id = std::to_string(cpu);
    std::ifstream file(root + "/sys/devices/system/cpu/cpu" + id +
                       "/topology/thread_siblings_list");
    std::string siblings;
    cores.insert(std::getline(file, siblings) ? siblings : id);
  }
  return cores.size();
}

std::set<int> affinity() {
  std::set<int> cpus;
  for (int count = 1024; count <= 1 << 20;
       count *= 2) {  // the kernel's mask may be longer than ours
    const size_t bytes = CPU_ALLOC_SIZE(count);
    std::vector<cpu_set_t> mask(bytes / sizeof(cpu_set_t));
    if (sched_getaffinity(0, bytes, mask.data()) != 0) continue;
    for (int cpu = 0; cpu < count; ++cpu) {
      if (CPU_ISSET_S(cpu, bytes, mask.data())) cpus.insert(cpu);
    }
    break;
  }
  return cpus;
}

}  // namespace

size_t available_memory_under(const std::string& root) {
  const auto kib = read_field(root + "/proc/meminfo", "MemAvailable:");
  const uint64_t system = kib ? *kib * 1024 : kUnlimited;
  return std::min(system, least(root, "memory", memory_left));
}

int usable_cores_under(const std::string& root, const std::set<int>& cpus) {
  const uint64_t cores = std::min(physical_cores(root, cpus), least(root, "cpu", cores_allowed));
  return static_cast<int>(std::max<uint64_t>(cores, 1));
}

size_t available_memory() { return available_memory_under(""); }

int usable_cores() { return usable_cores_under("", affinity()); }

}  // namespace rapshee
