// C++ errors as Python exceptions: InvalidArgument is ValueError, the others have types of their
// own.
#include <pybind11/pybind11.h>

#include <string>

#include "bindings/bindings.h"
#include "core/error.h"

namespace py = pybind11;

namespace rapshee::bindings {
namespace {

// A path is bytes to the system, and text to Python by a rule that takes any bytes.
py::object path_text(const std::string& path) {
  return py::reinterpret_steal<py::object>(
      PyUnicode_DecodeFSDefaultAndSize(path.data(), static_cast<Py_ssize_t>(path.size())));
}

}  // namespace

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
      PyErr_SetObject(weight_error.ptr(),
                      py::make_tuple(path_text(e.reason()), e.tensor(), path_text(e.file())).ptr());
    } catch (const DeviceError& e) {
      PyErr_SetString(device_error.ptr(), e.what());
    } catch (const InvalidArgument& e) {
      PyErr_SetString(PyExc_ValueError, e.what());
    }
  });
}

}  // namespace rapshee::bindings
