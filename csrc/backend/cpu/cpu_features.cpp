#include "backend/cpu/cpu_features.h"

#include <cstdlib>
#include <fstream>

#include "core/error.h"

namespace rapshee::cpu {
namespace {

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

std::string names(const std::vector<const KernelTable*>& tables) {
  std::string out;
  for (const KernelTable* table : tables)
    out += (out.empty() ? "" : ", ") + std::string(table->isa);
  return out;
}

#if defined(__x86_64__)
// __builtin_cpu_supports also checks that the operating system saves the registers.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
}
#endif

}  // namespace

std::vector<const KernelTable*> usable_kernels() {
  std::vector<const KernelTable*> tables = {&scalar_kernels()};
#if defined(__x86_64__)
  if (has_avx2()) tables.push_back(&avx2_kernels());
  if (has_avx512()) tables.push_back(&avx512_kernels());
#endif
  return tables;
}

const KernelTable& select_kernels(const std::string& isa) {
  const std::vector<const KernelTable*> tables = usable_kernels();
  const std::string wanted = isa.empty() ? environment("RAPSHEE_CPU_ISA") : isa;
  if (wanted.empty()) return *tables.back();
  for (const KernelTable* table : tables) {
    if (wanted == table->isa) return *table;
  }
  throw DeviceError("instruction set '" + wanted + "' (RAPSHEE_CPU_ISA) is not available on this " +
                    "processor; available: " + names(tables));
}

bool float_activations() {
  const std::string value = environment("RAPSHEE_CPU_ACT");
  if (value.empty()) return false;
  if (value == "f32") return true;
  throw DeviceError("RAPSHEE_CPU_ACT: got '" + value + "', expected f32 or nothing");
}

std::string cpu_model_name() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    const size_t value = line.find(": ");
    if (line.rfind("model name", 0) == 0 && value != std::string::npos) {
      return line.substr(value + 2);
    }
  }
  return "unknown";
}

std::vector<std::string> cpu_features() {
  std::vector<std::string> features;
#if defined(__x86_64__)
#define RAPSHEE_FEATURE(name) \
  if (__builtin_cpu_supports(name)) features.emplace_back(name)
  RAPSHEE_FEATURE("avx2");
  RAPSHEE_FEATURE("fma");
  RAPSHEE_FEATURE("f16c");
  RAPSHEE_FEATURE("avx512f");
  RAPSHEE_FEATURE("avx512bw");
  RAPSHEE_FEATURE("avx512dq");
  RAPSHEE_FEATURE("avx512vl");
  RAPSHEE_FEATURE("avx512vnni");
  RAPSHEE_FEATURE("avx512bf16");
#undef RAPSHEE_FEATURE
#endif
  return features;
}

}  // namespace rapshee::cpu
