// Bounds-checked reading of weight files.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace rapshee {

// An open regular file. Reads are positioned, so several threads may read at once. Memory mapping
// is not used: a file that shrinks under a mapping kills the process, under a read it is an error.
class FileReader {
 public:
  // Throws WeightError naming the file if it cannot be opened or is not a regular file.
  explicit FileReader(std::string path);
  ~FileReader();
  FileReader(FileReader&& other) noexcept;
  FileReader& operator=(FileReader&& other) noexcept;

  const std::string& path() const noexcept { return path_; }
  int64_t size() const noexcept { return size_; }  // bytes, when it was opened

  // Fills `out` from bytes [offset, offset + out.size()). Throws WeightError naming the file if
  // that is not inside the file, the file has shrunk, or the system reports an error.
  void read(int64_t offset, std::span<std::byte> out) const;

 private:
  std::string path_;
  int fd_ = -1;
  int64_t size_ = 0;
};

}  // namespace rapshee
