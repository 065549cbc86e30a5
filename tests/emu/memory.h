// Memory of the emulated device, and page-locked host memory.
//
// Every allocation is a region of its own between inaccessible pages, full of 0xff (NaN as a
// float, -1 as an integer). Freed regions stay known for a while, so that their use is told from
// that of an address that never was one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace rapshee::cuda::emu {

inline constexpr uint8_t kPoison = 0xff;
inline constexpr size_t kAllocationAlignment = 256;

enum class Space : uint8_t { kNone, kDevice, kPinned };

struct Region {
  uintptr_t begin = 0;
  size_t size = 0;  // of what may be accessed: 0 after free
  Space space = Space::kNone;
  size_t allocated = 0;  // bytes asked for
  bool freed = false;
};

// Stands for addresses in no region: nothing there may be accessed.
inline constexpr Region kNoRegion;

// Null where the system has no memory.
Region* allocate_region(size_t bytes, Space space);
// Gives the memory back; the region stays known until many others have been freed.
void free_region(Region& region);

// The region in which `address` lies, or at whose end it lies; kNoRegion where there is none.
const Region* find_region(uintptr_t address);

// The region that begins at `address`, freed or not, or null.
Region* region_at(uintptr_t address);

// Why `bytes` bytes at `address` may not be accessed in `space`, as part of a sentence; empty where
// they may.
std::string access_problem(uintptr_t address, size_t bytes, Space space);

}  // namespace rapshee::cuda::emu
