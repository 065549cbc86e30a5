// Typed errors. Everything that this library throws on purpose derives from Error.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

namespace rapshee {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// An argument is wrong; the message names field, got and expected. Python: ValueError.
class InvalidArgument : public Error {
 public:
  using Error::Error;
};

// The device failed, or none fits the request.
class DeviceError : public Error {
 public:
  using Error::Error;
};

// Weight bytes cannot be read or used. `what()` is "file: tensor 'name': reason", as far as known.
class WeightError : public Error {
 public:
  explicit WeightError(std::string reason, std::string tensor = "", std::string file = "")
      : Error(describe(reason, tensor, file)),
        reason_(std::move(reason)),
        tensor_(std::move(tensor)),
        file_(std::move(file)) {}

  const std::string& reason() const noexcept { return reason_; }
  const std::string& tensor() const noexcept { return tensor_; }  // empty: not known
  const std::string& file() const noexcept { return file_; }      // empty: not known

 private:
  static std::string describe(const std::string& reason, const std::string& tensor,
                              const std::string& file) {
    std::string text = file.empty() ? "" : file + ": ";
    if (!tensor.empty()) text += "tensor '" + tensor + "': ";
    return text + reason;
  }

  std::string reason_;
  std::string tensor_;
  std::string file_;
};

// All parts, streamed one after the other.
template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return std::move(text).str();
}

namespace detail {

template <class... Parts>
[[noreturn, gnu::cold, gnu::noinline]] void fail_check(std::string_view file, int line,
                                                       const Parts&... parts) {
  throw InvalidArgument(concat(parts..., " [", file.substr(file.rfind('/') + 1), ":", line, "]"));
}

}  // namespace detail
}  // namespace rapshee

// Throws InvalidArgument with the values unless `condition` holds:
//   RAPSHEE_CHECK(a == b, "rows: got ", a, ", expected ", b);
#define RAPSHEE_CHECK(condition, ...)                                 \
  do {                                                                \
    if (!(condition)) [[unlikely]]                                    \
      ::rapshee::detail::fail_check(__FILE__, __LINE__, __VA_ARGS__); \
  } while (false)
