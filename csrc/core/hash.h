// XXH64, by the public specification (github.com/Cyan4973/xxHash, doc/xxhash_spec.md, 0.2.0).
// Not cryptographic: it tells weights apart and finds damage, it does not resist an attacker.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

namespace rapshee {

class Xxh64 {
 public:
  explicit Xxh64(uint64_t seed = 0) noexcept;

  // Appends bytes; how they are cut into calls does not change the digest.
  void update(std::span<const std::byte> bytes) noexcept;

  // The hash of everything so far; more may follow.
  uint64_t digest() const noexcept;

 private:
  static constexpr size_t kStripe = 32;  // bytes: one 8-byte lane for each accumulator

  void consume(const std::byte* stripe) noexcept;

  uint64_t seed_;
  std::array<uint64_t, 4> lanes_;
  std::array<std::byte, kStripe> tail_{};  // the first total_ % kStripe bytes are waiting
  uint64_t total_ = 0;                     // bytes so far
};

uint64_t xxh64(std::span<const std::byte> bytes, uint64_t seed = 0) noexcept;

}  // namespace rapshee
