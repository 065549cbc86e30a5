// What bindings of kernels share: halves that come and go as floats, and weights on the device.
#pragma once

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "backend/cuda/kernels/launchers.h"
#include "bindings/cuda/device_array.h"
#include "core/dtype.h"

namespace rapshee::bindings {

inline cuda::HalfType half_arg(const std::string& half) {
  RAPSHEE_CHECK(half == "bf16" || half == "f16", "half: got '", half, "', expected bf16 or f16");
  return half == "bf16" ? cuda::HalfType::kBF16 : cuda::HalfType::kF16;
}

inline cuda::DeviceMemory upload_halves(const CallStream& stream, const py::array_t<float>& values,
                                        cuda::HalfType half) {
  std::vector<uint16_t> halves;
  for (float x : span_of(values)) {
    halves.push_back(half == cuda::HalfType::kBF16 ? f32_to_bf16(x) : f32_to_f16(x));
  }
  return stream.upload(halves.data(), halves.size());
}

inline py::array_t<float> download_halves(const CallStream& stream,
                                          const cuda::DeviceMemory& memory, cuda::HalfType half,
                                          std::vector<py::ssize_t> shape) {
  py::array_t<float> values(std::move(shape));
  std::vector<uint16_t> halves(static_cast<size_t>(values.size()));
  stream.download(memory, halves.data(), halves.size());
  std::transform(halves.begin(), halves.end(), values.mutable_data(), [&](uint16_t x) {
    return half == cuda::HalfType::kBF16 ? bf16_to_f32(x) : f16_to_f32(x);
  });
  return values;
}

// A packed weight (launchers.h) in device memory of its own: _cuda_ops.Weight.
class DeviceWeight {
 public:
  // format: half, q8, q4z, q4m, q2m, q3, q5m, q6 or plain; half: bf16 or f16. Contents are
  // undefined.
  DeviceWeight(const std::string& format, const std::string& half, int64_t rows, int64_t cols)
      : half_(half_arg(half)) {
    RAPSHEE_CHECK(rows >= 0 && cols >= 0, "weight: got [", rows, ", ", cols,
                  "], expected sizes of 0 or more");
    view_.format = format_arg(format);
    view_.rows = rows;
    view_.cols = cols;
    codes_ = cuda::DeviceMemory(view_.code_bytes());
    scales_ = cuda::DeviceMemory(view_.scale_bytes());
    view_.codes = codes_.data();
    view_.scales = scales_.data();
  }

  // codes, scales: uint8 of any number of dimensions, as they lie in memory.
  void write(const py::object& codes, const py::object& scales) {
    copy("codes", codes, codes_);
    copy("scales", scales, scales_);
  }

  py::tuple read() const {
    const auto bytes = [&](const cuda::DeviceMemory& memory) {
      return stream_.download<uint8_t>(memory, {static_cast<py::ssize_t>(memory.size())});
    };
    return py::make_tuple(bytes(codes_), bytes(scales_));
  }

  void fill_random(uint64_t seed) {
    cuda::fill_random(view_, half_, seed, stream_.get());
    stream_.synchronize();
  }

  const cuda::WeightView& view() const { return view_; }
  cuda::HalfType half() const { return half_; }

 private:
  static cuda::WeightFormat format_arg(const std::string& format) {
    using enum cuda::WeightFormat;
    constexpr std::pair<const char*, cuda::WeightFormat> kFormats[] = {
        {"half", kHalf}, {"q8", kQ8},   {"q4z", kQ4Z}, {"q4m", kQ4M},    {"q2m", kQ2M},
        {"q3", kQ3},     {"q5m", kQ5M}, {"q6", kQ6},   {"plain", kPlain}};
    for (const auto& [name, value] : kFormats) {
      if (format == name) return value;
    }
    RAPSHEE_CHECK(false, "format: got '", format,
                  "', expected half, q8, q4z, q4m, q2m, q3, q5m, q6 or plain");
  }

  void copy(const char* name, const py::object& value, cuda::DeviceMemory& to) {
    RAPSHEE_CHECK(py::isinstance<py::array>(value), name, ": expected a numpy array");
    const auto dimensions = static_cast<int>(py::reinterpret_borrow<py::array>(value).ndim());
    const auto bytes = array_arg<uint8_t>(name, value, dimensions);
    RAPSHEE_CHECK(static_cast<size_t>(bytes.size()) == to.size(), name, ": got ", bytes.size(),
                  " bytes, expected ", to.size());
    if (to.size() == 0) return;
    const cuda::PinnedMemory staging(to.size());
    std::copy_n(bytes.data(), to.size(), staging.data<uint8_t>());
    cuda::api::copy_to_device(to.data(), staging.data(), to.size(), stream_.get());
    stream_.synchronize();
  }

  CallStream stream_;
  cuda::HalfType half_;
  cuda::WeightView view_;
  cuda::DeviceMemory codes_, scales_;
};

}  // namespace rapshee::bindings
