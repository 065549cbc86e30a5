// C++ errors as Python exceptions: InvalidArgument is ValueError, the others have types of their
// own.
#include <pybind11/pybind11.h>

#include "bindings/bindings.h"
#include "core/error.h"

namespace py = pybind11;

namespace rapshee::bindings {

void register_errors(py::module_& m) {
  static py::handle weight_error =
      py::exception<WeightError>(m, "WeightError", PyExc_RuntimeError).release();
  static py::handle device_error =
      py::exception<DeviceError>(m, "DeviceError", PyExc_RuntimeError).release();
  // Of this module alone: _core and _cuda_ops have types of their own, and may share a process.
  py::register_local_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const WeightError& e) {
      PyErr_SetObject(weight_error.ptr(), py::make_tuple(e.reason(), e.tensor(), e.file()).ptr());
    } catch (const DeviceError& e) {
      PyErr_SetString(device_error.ptr(), e.what());
    } catch (const InvalidArgument& e) {
      PyErr_SetString(PyExc_ValueError, e.what());
    }
  });
}

}  // namespace rapshee::bindings
