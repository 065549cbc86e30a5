#include "emu/memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <deque>
#include <map>
#include <memory>

#include "core/error.h"

namespace rapshee::cuda::emu {
namespace {

constexpr size_t kQuarantine = 4096;  // freed regions that stay known

struct Mapping {
  Region region;
  char* pages = nullptr;  // with an inaccessible page at both ends
  size_t bytes = 0;

  Mapping() = default;
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping() {
    if (pages != nullptr) munmap(pages, bytes);
  }
};

// By first address.
std::map<uintptr_t, std::unique_ptr<Mapping>>& mappings() {
  static auto& all = *new std::map<uintptr_t, std::unique_ptr<Mapping>>;
  return all;
}

std::deque<uintptr_t>& quarantine() {
  static auto& all = *new std::deque<uintptr_t>;
  return all;
}

// Of the last look-up that found one: most look-ups come in runs.
const Region* last_found = &kNoRegion;

const char* name_of(Space space) {
  return space == Space::kPinned ? "page-locked host memory" : "device memory";
}

}  // namespace

Region* allocate_region(size_t bytes, Space space) {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  if (bytes > SIZE_MAX / 2) return nullptr;
  auto mapping = std::make_unique<Mapping>();
  mapping->bytes = (bytes + page - 1) / page * page + 2 * page;
  void* pages = mmap(nullptr, mapping->bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) return nullptr;
  mapping->pages = static_cast<char*>(pages);
  char* first = mapping->pages + page;
  if (mprotect(first, mapping->bytes - 2 * page, PROT_READ | PROT_WRITE) != 0) return nullptr;
  std::memset(first, kPoison, bytes);
  const auto address = reinterpret_cast<uintptr_t>(first);
  mapping->region = {address, bytes, space, bytes, false};
  Region* region = &mapping->region;
  mappings()[address] = std::move(mapping);
  return region;
}

void free_region(Region& region) {
  const auto found = mappings().find(region.begin);
  Mapping& mapping = *found->second;
  region.size = 0;
  region.freed = true;
  // Mapping over them drops the pages and makes their address fault.
  mmap(mapping.pages, mapping.bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
  quarantine().push_back(region.begin);
  if (quarantine().size() <= kQuarantine) return;
  last_found = &kNoRegion;
  mappings().erase(quarantine().front());
  quarantine().pop_front();
}

const Region* find_region(uintptr_t address) {
  if (address - last_found->begin < last_found->allocated) return last_found;
  const auto after = mappings().upper_bound(address);
  if (after == mappings().begin()) return &kNoRegion;
  const Region& region = std::prev(after)->second->region;
  if (address - region.begin > region.allocated) return &kNoRegion;
  return last_found = &region;
}

Region* region_at(uintptr_t address) {
  const auto found = mappings().find(address);
  return found == mappings().end() ? nullptr : &found->second->region;
}

std::string access_problem(uintptr_t address, size_t bytes, Space space) {
  const Region& region = *find_region(address);
  if (&region == &kNoRegion) {
    return concat("address 0x", std::hex, address, " is in no ", name_of(space));
  }
  if (region.space != space) {
    return concat("address 0x", std::hex, address, " is ", name_of(region.space), ", not ",
                  name_of(space));
  }
  const std::string where =
      concat(bytes, " bytes at byte ", static_cast<int64_t>(address - region.begin),
             " of an allocation of ", region.allocated, " bytes");
  if (region.freed) return where + " that has been freed";
  if (address - region.begin + bytes > region.size) return "out of bounds: " + where;
  return "";
}

}  // namespace rapshee::cuda::emu
