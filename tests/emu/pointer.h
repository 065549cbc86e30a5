// Checked pointers of kernels: every access is held against the bounds, the alignment and the
// state of what it points to. They convert, move and compare as pointers do.
#pragma once

#include <compare>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emu/block.h"
#include "emu/memory.h"
#include "emu/shared_memory.h"

namespace rapshee::cuda::emu {

[[noreturn, gnu::cold, gnu::noinline]] void fail_global(const Region* region, uintptr_t address,
                                                        size_t bytes, size_t alignment);

enum class Before : bool { kForbidden, kAllowed };  // pdl_wait

inline void check_global(const Region* region, uintptr_t address, size_t bytes, size_t alignment,
                         Before pdl_wait = Before::kForbidden) {
  const size_t at = address - region->begin;
  if (at < region->size && region->size - at >= bytes && address % alignment == 0 &&
      region->space == Space::kDevice &&
      (context.thread->pdl_waited || pdl_wait == Before::kAllowed)) [[likely]] {
    return;
  }
  fail_global(region, address, bytes, alignment);
}

// How accesses to the two kinds of memory are checked.
class Global {
 public:
  Global() = default;
  explicit Global(uintptr_t address) : region_(address == 0 ? &kNoRegion : find_region(address)) {}

  void access(uintptr_t address, size_t bytes, size_t alignment, bool) const {
    check_global(region_, address, bytes, alignment);
  }
  void read(uintptr_t address, size_t bytes, size_t alignment) const {
    check_global(region_, address, bytes, alignment);
  }
  void write(uintptr_t address, size_t bytes, size_t alignment) const {
    check_global(region_, address, bytes, alignment);
  }
  void update(uintptr_t address, size_t bytes, size_t alignment) const {
    check_global(region_, address, bytes, alignment);
  }
  const Region* region() const { return region_; }

 private:
  const Region* region_ = &kNoRegion;
};

class Shared {
 public:
  Shared() = default;
  explicit Shared(uintptr_t) {}

  void access(uintptr_t address, size_t bytes, size_t alignment, bool is_const) const {
    if (is_const) {
      read_shared(address, bytes, alignment);
    } else {
      access_shared(address, bytes, alignment);
    }
  }
  void read(uintptr_t address, size_t bytes, size_t alignment) const {
    read_shared(address, bytes, alignment);
  }
  void write(uintptr_t address, size_t bytes, size_t alignment) const {
    write_shared(address, bytes, alignment);
  }
  void update(uintptr_t address, size_t bytes, size_t alignment) const {
    update_shared(address, bytes, alignment);
  }
};

template <class T, class Memory>
class Pointer {
 public:
  using Element = T;

  Pointer() = default;
  Pointer(std::nullptr_t) {}
  Pointer(T* raw) : address_(reinterpret_cast<uintptr_t>(raw)), memory_(address_) {}
  Pointer(uintptr_t address, const Memory& memory) : address_(address), memory_(memory) {}
  operator Pointer<const T, Memory>() const
    requires(!std::is_const_v<T>)
  {
    return {address_, memory_};
  }

  uintptr_t address() const { return address_; }
  const Memory& memory() const { return memory_; }

  template <std::integral I>
  T& operator[](I index) const {
    return *(*this + index);
  }
  T& operator*() const {
    memory_.access(address_, sizeof(T), alignof(T), std::is_const_v<T>);
    return *reinterpret_cast<T*>(address_);
  }
  T* operator->() const { return &**this; }

  template <std::integral I>
  Pointer& operator+=(I count) {
    address_ += static_cast<uintptr_t>(static_cast<int64_t>(count)) * sizeof(T);
    return *this;
  }
  template <std::integral I>
  Pointer& operator-=(I count) {
    address_ -= static_cast<uintptr_t>(static_cast<int64_t>(count)) * sizeof(T);
    return *this;
  }
  Pointer& operator++() { return *this += 1; }
  Pointer& operator--() { return *this -= 1; }
  Pointer operator++(int) {
    const Pointer before = *this;
    ++*this;
    return before;
  }
  Pointer operator--(int) {
    const Pointer before = *this;
    --*this;
    return before;
  }
  template <std::integral I>
  friend Pointer operator+(Pointer p, I count) {
    return p += count;
  }
  template <std::integral I>
  friend Pointer operator+(I count, Pointer p) {
    return p += count;
  }
  template <std::integral I>
  friend Pointer operator-(Pointer p, I count) {
    return p -= count;
  }
  friend std::ptrdiff_t operator-(const Pointer& a, const Pointer& b) {
    return static_cast<std::ptrdiff_t>(a.address_ - b.address_) /
           static_cast<std::ptrdiff_t>(sizeof(T));
  }

  explicit operator bool() const { return address_ != 0; }
  friend bool operator==(const Pointer& a, const Pointer& b) { return a.address_ == b.address_; }
  friend auto operator<=>(const Pointer& a, const Pointer& b) { return a.address_ <=> b.address_; }
  friend bool operator==(const Pointer& a, std::nullptr_t) { return a.address_ == 0; }

 private:
  uintptr_t address_ = 0;
  [[no_unique_address]] Memory memory_;
};

// All bytes at once, aligned to them.
template <class V, class T, class Memory>
V load_vector(const Pointer<T, Memory>& p) {
  p.memory().read(p.address(), sizeof(V), sizeof(V));
  V v;
  std::memcpy(&v, reinterpret_cast<const void*>(p.address()), sizeof(V));
  return v;
}

template <class V, class T, class Memory>
void store_vector(const Pointer<T, Memory>& p, const V& v) {
  static_assert(!std::is_const_v<T>);
  p.memory().write(p.address(), sizeof(V), sizeof(V));
  std::memcpy(reinterpret_cast<void*>(p.address()), &v, sizeof(V));
}

// Replaces *p by `change` of it; returns what was there.
template <class T, class Memory, class Change>
T update(const Pointer<T, Memory>& p, Change&& change) {
  p.memory().update(p.address(), sizeof(T), sizeof(T));
  T& value = *reinterpret_cast<T*>(p.address());
  const T before = value;
  value = change(before);
  return before;
}

inline bool is_shared(const void* p) {
  return reinterpret_cast<uintptr_t>(p) - context.shared_begin < kMaxSharedBytes;
}

}  // namespace rapshee::cuda::emu
