// The limits of the machine, for benchmarks.
#include <pybind11/pybind11.h>

#include <string>

#include "backend/cpu/cpu_features.h"
#include "backend/cpu/roofline.h"
#include "bindings/bindings.h"
#include "core/error.h"
#include "core/thread_pool.h"

namespace py = pybind11;

namespace rapshee::bindings {
namespace {

void check_threads(int threads) {
  RAPSHEE_CHECK(threads >= 1 && threads <= ThreadPool::kMaxThreads, "threads: got ", threads,
                ", expected 1 to ", ThreadPool::kMaxThreads);
}

double measure_read(int64_t nbytes, int threads, const std::string& isa) {
  check_threads(threads);
  RAPSHEE_CHECK(nbytes >= 1, "nbytes: got ", nbytes, ", expected 1 or more");
  const cpu::KernelTable& kernels = cpu::select_kernels(isa);
  const py::gil_scoped_release unlocked;
  return cpu::measure_read(kernels, threads, static_cast<size_t>(nbytes));
}

double measure_peak(const std::string& kind, int threads, const std::string& isa) {
  check_threads(threads);
  RAPSHEE_CHECK(kind == "f32" || kind == "bf16" || kind == "int8", "kind: got '", kind,
                "', expected f32, bf16 or int8");
  const cpu::PeakKind peak = kind == "f32"    ? cpu::PeakKind::kF32
                             : kind == "bf16" ? cpu::PeakKind::kBF16
                                              : cpu::PeakKind::kInt8;
  const cpu::KernelTable& kernels = cpu::select_kernels(isa);
  const py::gil_scoped_release unlocked;
  return cpu::measure_peak(kernels, threads, peak);
}

}  // namespace

void register_roofline(py::module_& m) {
  using py::arg;
  m.def("measure_read", &measure_read, arg("nbytes"), py::kw_only(), arg("threads") = 1,
        arg("isa") = "");
  m.def("measure_peak", &measure_peak, arg("kind"), py::kw_only(), arg("threads") = 1,
        arg("isa") = "");
}

}  // namespace rapshee::bindings
