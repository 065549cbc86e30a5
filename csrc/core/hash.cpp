#include "core/hash.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace rapshee {
namespace {

constexpr uint64_t kPrime1 = 0x9E3779B185EBCA87u;
constexpr uint64_t kPrime2 = 0xC2B2AE3D27D4EB4Fu;
constexpr uint64_t kPrime3 = 0x165667B19E3779F9u;
constexpr uint64_t kPrime4 = 0x85EBCA77C2B2AE63u;
constexpr uint64_t kPrime5 = 0x27D4EB2F165667C5u;

static_assert(std::endian::native == std::endian::little);  // words are read as they lie

template <class Word>
uint64_t load(const std::byte* bytes) noexcept {
  Word word;
  std::memcpy(&word, bytes, sizeof(word));
  return word;
}

uint64_t round(uint64_t lane, uint64_t input) noexcept {
  return std::rotl(lane + input * kPrime2, 31) * kPrime1;
}

uint64_t merge(uint64_t hash, uint64_t lane) noexcept {
  return (hash ^ round(0, lane)) * kPrime1 + kPrime4;
}

uint64_t finish_tail(uint64_t hash, std::span<const std::byte> tail) noexcept {
  for (; tail.size() >= 8; tail = tail.subspan(8)) {
    hash ^= round(0, load<uint64_t>(tail.data()));
    hash = std::rotl(hash, 27) * kPrime1 + kPrime4;
  }
  if (tail.size() >= 4) {
    hash ^= load<uint32_t>(tail.data()) * kPrime1;
    hash = std::rotl(hash, 23) * kPrime2 + kPrime3;
    tail = tail.subspan(4);
  }
  for (const std::byte byte : tail) {
    hash ^= std::to_integer<uint64_t>(byte) * kPrime5;
    hash = std::rotl(hash, 11) * kPrime1;
  }
  return hash;
}

uint64_t avalanche(uint64_t hash) noexcept {
  hash = (hash ^ (hash >> 33)) * kPrime2;
  hash = (hash ^ (hash >> 29)) * kPrime3;
  return hash ^ (hash >> 32);
}

}  // namespace

Xxh64::Xxh64(uint64_t seed) noexcept
    : seed_(seed), lanes_{seed + kPrime1 + kPrime2, seed + kPrime2, seed, seed - kPrime1} {}

void Xxh64::consume(const std::byte* stripe) noexcept {
  for (size_t i = 0; i < lanes_.size(); ++i) {
    lanes_[i] = round(lanes_[i], load<uint64_t>(stripe + 8 * i));
  }
}

void Xxh64::update(std::span<const std::byte> bytes) noexcept {
  const size_t waiting = total_ % kStripe;
  total_ += bytes.size();
  if (waiting > 0) {
    const size_t taken = std::min(kStripe - waiting, bytes.size());
    std::copy_n(bytes.begin(), taken, tail_.begin() + waiting);
    bytes = bytes.subspan(taken);
    if (waiting + taken < kStripe) return;
    consume(tail_.data());
  }
  for (; bytes.size() >= kStripe; bytes = bytes.subspan(kStripe)) consume(bytes.data());
  std::copy(bytes.begin(), bytes.end(), tail_.begin());
}

uint64_t Xxh64::digest() const noexcept {
  uint64_t hash = seed_ + kPrime5;
  if (total_ >= kStripe) {
    hash = std::rotl(lanes_[0], 1) + std::rotl(lanes_[1], 7) + std::rotl(lanes_[2], 12) +
           std::rotl(lanes_[3], 18);
    for (const uint64_t lane : lanes_) hash = merge(hash, lane);
  }
  const std::span<const std::byte> tail(tail_.data(), total_ % kStripe);
  return avalanche(finish_tail(hash + total_, tail));
}

uint64_t xxh64(std::span<const std::byte> bytes, uint64_t seed) noexcept {
  Xxh64 hash(seed);
  hash.update(bytes);
  return hash.digest();
}

}  // namespace rapshee
