// What the operating system lets this process use.
#pragma once

#include <cstddef>
#include <set>
#include <string>

namespace rapshee {

// Bytes that could still be allocated: the least of the system's available memory and what the
// cgroups of this process (version 1 or 2, all ancestors) leave.
size_t available_memory();

// Physical cores that this process may use (CPU affinity and cgroup quota respected), at least 1.
int usable_cores();

// The same from the pseudo files under `root` instead of "/", and for the given CPUs.
size_t available_memory_under(const std::string& root);
int usable_cores_under(const std::string& root, const std::set<int>& cpus);

}  // namespace rapshee
