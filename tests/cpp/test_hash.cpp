#include "core/hash.h"

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "check.h"

namespace rapshee {
namespace {

uint64_t hash_text(std::string_view text, uint64_t seed = 0) {
  return xxh64(std::as_bytes(std::span(text)), seed);
}

// The generator of the specification's own sanity check: bytes of a 64-bit product sequence.
std::vector<std::byte> sanity_buffer(size_t size) {
  std::vector<std::byte> buffer(size);
  uint64_t state = 2654435761u;
  for (std::byte& byte : buffer) {
    byte = static_cast<std::byte>(state >> 56);
    state *= 11400714785074694797u;
  }
  return buffer;
}

TEST_CASE(published_values) {
  CHECK_EQ(hash_text(""), 0xEF46DB3751D8E999u);
  CHECK_EQ(hash_text("a"), 0xD24EC4F1A98C6E5Bu);
  CHECK_EQ(hash_text("abc"), 0x44BC2CF5AD770999u);
}

TEST_CASE(published_sanity_buffer) {
  constexpr uint64_t kSeed = 2654435761u;
  const std::vector<std::byte> buffer = sanity_buffer(222);
  const auto first = [&](size_t n) { return std::span(buffer).first(n); };
  CHECK_EQ(xxh64(first(0), kSeed), 0xAC75FDA2929B17EFu);
  CHECK_EQ(xxh64(first(1)), 0xE934A84ADB052768u);
  CHECK_EQ(xxh64(first(1), kSeed), 0x5014607643A9B4C3u);
  CHECK_EQ(xxh64(first(4)), 0x9136A0DCA57457EEu);
  CHECK_EQ(xxh64(first(14)), 0x8282DCC4994E35C8u);
  CHECK_EQ(xxh64(first(14), kSeed), 0xC3BD6BF63DEB6DF0u);
  CHECK_EQ(xxh64(first(222)), 0xB641AE8CB691C174u);
  CHECK_EQ(xxh64(first(222), kSeed), 0x20CB8AB7AE10C14Au);
}

TEST_CASE(pieces_give_the_digest_of_the_whole) {
  const std::vector<std::byte> buffer = sanity_buffer(200);
  const std::span<const std::byte> all(buffer);
  for (size_t size = 0; size <= all.size(); ++size) {
    for (const size_t piece : {1, 7, 31, 32, 33, 100}) {
      Xxh64 hash(size);
      for (size_t at = 0; at < size; at += piece) {
        hash.update(all.subspan(at, std::min(piece, size - at)));
      }
      CHECK_EQ(hash.digest(), xxh64(all.first(size), size));
    }
  }
}

TEST_CASE(a_digest_may_be_taken_on_the_way) {
  const std::vector<std::byte> buffer = sanity_buffer(100);
  const std::span<const std::byte> all(buffer);
  Xxh64 hash;
  hash.update(all.first(45));
  CHECK_EQ(hash.digest(), xxh64(all.first(45)));
  hash.update({});
  hash.update(all.subspan(45));
  CHECK_EQ(hash.digest(), xxh64(all));
}

}  // namespace
}  // namespace rapshee

TEST_MAIN()
