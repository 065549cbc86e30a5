#include "core/file_reader.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>
#include <utility>

#include "core/error.h"

namespace rapshee {
namespace {

// Linux transfers at most 2^31 - 4096 bytes a call.
constexpr size_t kMostPerCall = size_t{1} << 30;

std::string system_message(int error) { return std::generic_category().message(error); }

int open_for_reading(const std::string& path) {
  // O_NONBLOCK: opening a named pipe must not wait for a writer; regular files ignore it.
  constexpr int kFlags = O_RDONLY | O_CLOEXEC | O_NONBLOCK;
  for (;;) {
    const int fd = ::open(path.c_str(), kFlags);
    if (fd >= 0) return fd;
    if (errno != EINTR) throw WeightError("cannot open: " + system_message(errno), "", path);
  }
}

}  // namespace

FileReader::FileReader(std::string path) : path_(std::move(path)), fd_(open_for_reading(path_)) {
  struct stat info{};
  const int error = ::fstat(fd_, &info) == 0 ? 0 : errno;
  if (error == 0 && S_ISREG(info.st_mode)) {
    size_ = info.st_size;
    return;
  }
  ::close(fd_);
  throw WeightError(error != 0 ? "cannot stat: " + system_message(error) : "not a regular file", "",
                    path_);
}

FileReader::~FileReader() {
  if (fd_ >= 0) ::close(fd_);
}

FileReader::FileReader(FileReader&& other) noexcept
    : path_(std::move(other.path_)),
      fd_(std::exchange(other.fd_, -1)),
      size_(std::exchange(other.size_, 0)) {}

FileReader& FileReader::operator=(FileReader&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(fd_, other.fd_);
  std::swap(size_, other.size_);
  return *this;
}

void FileReader::read(int64_t offset, std::span<std::byte> out) const {
  const uint64_t size = static_cast<uint64_t>(size_);
  const uint64_t begin = static_cast<uint64_t>(offset);
  if (offset < 0 || begin > size || out.size() > size - begin) {
    throw WeightError(
        concat("bytes ", offset, " + ", out.size(), " lie outside the file of ", size_, " bytes"),
        "", path_);
  }
  while (!out.empty()) {
    const ssize_t n = ::pread(fd_, out.data(), std::min(out.size(), kMostPerCall), offset);
    if (n > 0) {
      out = out.subspan(static_cast<size_t>(n));
      offset += n;
    } else if (n == 0) {
      throw WeightError(concat("ends at byte ", offset, ", it had ", size_, " when it was opened"),
                        "", path_);
    } else if (errno != EINTR) {
      throw WeightError(concat("cannot read at byte ", offset, ": ", system_message(errno)), "",
                        path_);
    }
  }
}

}  // namespace rapshee
