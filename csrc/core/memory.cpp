#include "core/memory.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "core/error.h"

#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace rapshee {
namespace {

constexpr size_t kHugePage = size_t{1} << 21;

[[noreturn]] void out_of_memory(size_t bytes) {
  throw DeviceError(
      concat("out of memory: cannot allocate ", bytes, " bytes (", bytes >> 20, " MiB)"));
}

size_t round_up(size_t bytes, size_t to) {
  if (bytes > SIZE_MAX - to) out_of_memory(bytes);
  return (bytes + to - 1) / to * to;
}

std::byte* map(size_t bytes) {
  void* data = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) out_of_memory(bytes);
  ::madvise(data, bytes, MADV_HUGEPAGE);  // a hint: without huge pages it works as well
  return static_cast<std::byte*>(data);
}

}  // namespace

AlignedBuffer::AlignedBuffer(size_t bytes) : size_(bytes) {
  if (bytes == 0) return;
  if (bytes >= kMapThreshold) {
    data_ = map(round_up(bytes, kHugePage));
    return;
  }
  const size_t whole = round_up(bytes, kAlignment);
  data_ = static_cast<std::byte*>(std::aligned_alloc(kAlignment, whole));
  if (data_ == nullptr) out_of_memory(bytes);
  std::memset(data_, 0, whole);
}

AlignedBuffer::~AlignedBuffer() {
  if (size_ >= kMapThreshold) {
    ::munmap(data_, round_up(size_, kHugePage));
  } else {
    std::free(data_);
  }
}

AlignedBuffer::AlignedBuffer(AlignedBuffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

AlignedBuffer& AlignedBuffer::operator=(AlignedBuffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

void return_unused_memory() noexcept {
#ifdef __GLIBC__
  ::malloc_trim(0);
#endif
}

}  // namespace rapshee
