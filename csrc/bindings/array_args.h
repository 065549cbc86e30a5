// numpy arrays as arguments: dtype, dimensions and layout are checked, nothing is cast or copied
// silently.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <span>
#include <string>
#include <vector>

#include "core/error.h"

namespace rapshee::bindings {

namespace py = pybind11;

// A C-contiguous array of T with `ndim` dimensions. Takes py::object, as a typed py::array_t
// parameter would convert what does not fit.
template <class T>
py::array_t<T> array_arg(const char* name, const py::object& value, int ndim) {
  RAPSHEE_CHECK(py::isinstance<py::array>(value), name, ": got ",
                py::str(py::type::of(value)).cast<std::string>(), ", expected a numpy array");
  const auto array = py::reinterpret_borrow<py::array>(value);
  RAPSHEE_CHECK(array.dtype().is(py::dtype::of<T>()) || array.dtype().equal(py::dtype::of<T>()),
                name, ": got dtype ", py::str(array.dtype()).cast<std::string>(), ", expected ",
                py::str(py::dtype::of<T>()).template cast<std::string>());
  RAPSHEE_CHECK(array.ndim() == ndim, name, ": got ", array.ndim(), " dimensions, expected ", ndim);
  RAPSHEE_CHECK(array.flags() & py::array::c_style, name, ": expected a C-contiguous array");
  return py::reinterpret_borrow<py::array_t<T>>(value);
}

template <class T>
std::span<const T> span_of(const py::array_t<T>& array) {
  return {array.data(), static_cast<size_t>(array.size())};
}

// Copies a one-dimensional argument into `to`, whose memory is reused.
template <class T>
void copy_arg(const char* name, const py::object& value, std::vector<T>& to) {
  const auto array = array_arg<T>(name, value, 1);
  to.assign(array.data(), array.data() + array.size());
}

// An array that owns `values`, without a copy; read-only.
template <class T>
py::array_t<T> to_array(std::vector<T> values, std::vector<py::ssize_t> shape) {
  auto* owned = new std::vector<T>(std::move(values));
  const py::capsule owner(owned, [](void* p) { delete static_cast<std::vector<T>*>(p); });
  py::array_t<T> array(std::move(shape), owned->data(), owner);
  array.attr("setflags")(py::arg("write") = false);
  return array;
}

}  // namespace rapshee::bindings
