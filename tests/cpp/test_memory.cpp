#include "core/memory.h"

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>

#include "check.h"
#include "core/error.h"

namespace rapshee {
namespace {

constexpr size_t kThreshold = AlignedBuffer::kMapThreshold;

TEST_CASE(bytes_are_zero_and_aligned) {
  for (const size_t size : {size_t{1}, size_t{63}, size_t{64}, size_t{65}, kThreshold - 1,
                            kThreshold, kThreshold + 1, 3 * kThreshold + 5}) {
    AlignedBuffer buffer(size);
    CHECK_EQ(buffer.size(), size);
    CHECK_EQ(reinterpret_cast<uintptr_t>(buffer.data()) % AlignedBuffer::kAlignment, 0u);
    const auto bytes = buffer.as<uint8_t>();
    CHECK(std::all_of(bytes.begin(), bytes.end(), [](uint8_t byte) { return byte == 0; }));
    std::fill(bytes.begin(), bytes.end(), uint8_t{0xff});
  }
}

TEST_CASE(nothing_needs_no_memory) {
  const AlignedBuffer buffer(0);
  CHECK(buffer.empty());
  CHECK(buffer.data() == nullptr);
  CHECK(AlignedBuffer().as<float>().empty());
}

TEST_CASE(views_hold_whole_elements) {
  AlignedBuffer buffer(11);
  CHECK_EQ(buffer.as<uint32_t>().size(), 2u);
}

TEST_CASE(moves_hand_the_bytes_over) {
  AlignedBuffer small(100);
  AlignedBuffer large(kThreshold);
  const std::byte* data = large.data();
  small = std::move(large);
  const AlignedBuffer moved(std::move(small));
  CHECK(moved.data() == data);
  CHECK_EQ(moved.size(), kThreshold);
}

TEST_CASE(too_much_is_an_error_with_the_size) {
  constexpr size_t kTooMuch = size_t{1} << 60;
  const std::string message = MESSAGE_OF(DeviceError, AlignedBuffer{kTooMuch});
  CHECK(message.find("1152921504606846976 bytes") != std::string::npos);
  CHECK(!MESSAGE_OF(DeviceError, AlignedBuffer{SIZE_MAX}).empty());
}

}  // namespace
}  // namespace rapshee

TEST_MAIN()
