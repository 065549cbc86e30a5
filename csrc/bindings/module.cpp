// Table of contents of rapshee_engine._core.
#include "bindings/bindings.h"

PYBIND11_MODULE(_core, m) {
  using namespace rapshee::bindings;
  m.attr("__version__") = RAPSHEE_VERSION;
  register_errors(m);
  register_model(m);
  register_devices(m);
  register_runner(m);
  register_ops(m);
  register_quantize(m);
  register_roofline(m);
  register_sampling_ops(m);
}
