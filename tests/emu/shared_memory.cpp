#include "emu/shared_memory.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "core/error.h"
#include "emu/block.h"
#include "emu/memory.h"

namespace rapshee::cuda::emu {
namespace {

constexpr size_t kWord = 4;
constexpr size_t kNumWords = kMaxSharedBytes / kWord;

// Readers or writers since the last barrier: a thread, several of a warp, or several warps.
using Who = uint16_t;
constexpr Who kSeveralOfWarp = kMaxFibers;  // + warp
constexpr Who kSeveralWarps = 0xffff;

int warp_of(Who who) { return who < kSeveralOfWarp ? who / kWarpSize : who - kSeveralOfWarp; }

// The history of a word, or of a byte of a word whose bytes are not used together.
struct Cell {
  uint32_t write_time = 0, read_time = 0;  // 0: never
  Who writer = 0, reader = 0;
  bool atomic = false;    // the writes
  bool split = false;     // of words: the bytes have their own; times are the latest of theirs
  bool reserved = false;  // a copy is under way
};

struct Detector {
  alignas(128) char memory[kMaxSharedBytes];
  Cell words[kNumWords];
  Cell bytes[kNumWords][kWord];
  uint32_t now = 0;
  uint32_t block_time = 0;  // of the last barrier
  uint32_t warp_time[kMaxWarps] = {};
};
Detector detector;

// The access through a reference that is not settled yet.
struct Unsettled {
  uintptr_t address = 0;  // 0: none
  size_t bytes = 0;
  char before[64];
};
Unsettled unsettled;

std::string describe(Who who) {
  if (who == kSeveralWarps) return "threads of several warps";
  if (who >= kSeveralOfWarp) return concat("several lanes of warp ", who - kSeveralOfWarp);
  return concat("thread ", who);
}

[[noreturn, gnu::cold, gnu::noinline]] void fail_race(const char* doing, uintptr_t address,
                                                      const char* done, Who who) {
  fail(concat("race on shared memory: ", doing, " at byte ", address - context.shared_begin,
              ", which ", describe(who), " has ", done,
              " with no barrier in between (sync(), or sync_warp() within a warp)"));
}

[[gnu::cold, gnu::noinline]] void fail_access(uintptr_t address, size_t bytes, size_t alignment) {
  const auto at = static_cast<int64_t>(address - context.shared_begin);
  if (address == 0) fail(concat("null pointer: ", bytes, " bytes of shared memory"));
  if (at < 0 || static_cast<size_t>(at) + bytes > context.shared_bytes) {
    fail(concat("out of bounds: ", bytes, " bytes at byte ", at, " of ", context.shared_bytes,
                " bytes of shared memory"));
  }
  fail(concat("misaligned: byte ", at, " of shared memory, expected a multiple of ", alignment));
}

void check_access(uintptr_t address, size_t bytes, size_t alignment) {
  const size_t at = address - context.shared_begin;
  if (at < context.shared_bytes && context.shared_bytes - at >= bytes && at % alignment == 0) {
    return;
  }
  fail_access(address, bytes, alignment);
}

// The running thread, and since when it knows nothing of what the others do.
struct Observer {
  Who self;
  int warp;
  uint32_t warp_time;

  static Observer current() {
    const int thread = context.thread->index, warp = thread / kWarpSize;
    return {static_cast<Who>(thread), warp, detector.warp_time[warp]};
  }
  // Whether what `who` did at `time` may come before or after what this thread does.
  bool races(Who who, uint32_t time) const {
    if (time < detector.block_time || who == self) return false;
    return who == kSeveralWarps || warp_of(who) != warp || time >= warp_time;
  }
  Who joined(Who who, uint32_t time) const {
    if (time < detector.block_time || who == self) return self;
    if (who == kSeveralWarps || warp_of(who) != warp) return kSeveralWarps;
    return time < warp_time ? self : static_cast<Who>(kSeveralOfWarp + warp);
  }
};

enum class Act : uint8_t { kRead, kWrite, kUpdate };

template <Act kAct>
void note(Cell& cell, uintptr_t address, const Observer& me) {
  constexpr const char* kDoing = kAct == Act::kRead    ? "read"
                                 : kAct == Act::kWrite ? "write"
                                                       : "atomic operation";
  if (!(kAct == Act::kUpdate && cell.atomic) && me.races(cell.writer, cell.write_time)) {
    fail_race(kDoing, address, "written", cell.writer);
  }
  if constexpr (kAct == Act::kRead) {
    cell.reader = me.joined(cell.reader, cell.read_time);
    cell.read_time = detector.now;
    return;
  }
  if (me.races(cell.reader, cell.read_time)) fail_race(kDoing, address, "read", cell.reader);
  cell.writer = me.joined(cell.writer, cell.write_time);
  cell.write_time = detector.now;
  cell.atomic = kAct == Act::kUpdate;
}

// `first` to `last`: bytes of the word.
template <Act kAct>
void note_bytes(size_t index, size_t first, size_t last, const Observer& me) {
  Cell& word = detector.words[index];
  Cell* const bytes = detector.bytes[index];
  const bool fresh = std::max(word.write_time, word.read_time) < detector.block_time;
  if (fresh || !word.split) std::fill_n(bytes, kWord, fresh ? Cell{} : word);
  for (size_t i = first; i < last; ++i) {
    note<kAct>(bytes[i], context.shared_begin + index * kWord + i, me);
  }
  word.split = true;
  word.read_time = detector.now;
}

template <Act kAct>
void note_all(uintptr_t address, size_t count) {
  const Observer me = Observer::current();
  const size_t begin = address - context.shared_begin, end = begin + count;
  for (size_t at = begin; at < end;) {
    const size_t index = at / kWord, next = std::min(end, (index + 1) * kWord);
    Cell& word = detector.words[index];
    if (word.reserved) [[unlikely]] {
      fail(concat("race on shared memory: byte ", at,
                  " is the target of a cp.async whose thread has not waited for it"));
    }
    const bool whole = next - at == kWord;
    if (whole && word.split && std::max(word.write_time, word.read_time) < detector.block_time) {
      word = {};
    }
    if (whole && !word.split) {
      note<kAct>(word, address + (at - begin), me);
    } else {
      note_bytes<kAct>(index, at % kWord, at % kWord + (next - at), me);
    }
    at = next;
  }
}

void set_reserved(uintptr_t address, bool reserved) {
  Cell* const words = detector.words + (address - context.shared_begin) / kWord;
  for (size_t i = 0; i < kAsyncBytes / kWord; ++i) words[i].reserved = reserved;
}

}  // namespace

void begin_shared_memory(size_t bytes) {
  std::memset(detector.memory, kPoison, bytes);
  unsettled.address = 0;
  if (detector.now > UINT32_MAX / 2) {
    std::fill_n(detector.words, kNumWords, Cell{});
    std::fill_n(detector.warp_time, kMaxWarps, 0);
    detector.now = 0;
  }
  order_block();
}

uintptr_t shared_memory() { return reinterpret_cast<uintptr_t>(detector.memory); }

void order_block() { detector.block_time = ++detector.now; }
void order_warp(int warp) { detector.warp_time[warp] = ++detector.now; }

void settle_access() {
  if (unsettled.address == 0) return;
  const Unsettled access = std::exchange(unsettled, {});
  const bool changed =
      std::memcmp(access.before, reinterpret_cast<const void*>(access.address), access.bytes) != 0;
  if (changed) {
    note_all<Act::kWrite>(access.address, access.bytes);
  } else {
    note_all<Act::kRead>(access.address, access.bytes);
  }
}

void read_shared(uintptr_t address, size_t bytes, size_t alignment) {
  settle_access();
  check_access(address, bytes, alignment);
  note_all<Act::kRead>(address, bytes);
}

void write_shared(uintptr_t address, size_t bytes, size_t alignment) {
  settle_access();
  check_access(address, bytes, alignment);
  note_all<Act::kWrite>(address, bytes);
}

void update_shared(uintptr_t address, size_t bytes, size_t alignment) {
  settle_access();
  check_access(address, bytes, alignment);
  note_all<Act::kUpdate>(address, bytes);
}

void access_shared(uintptr_t address, size_t bytes, size_t alignment) {
  settle_access();
  check_access(address, bytes, alignment);
  if (bytes > sizeof(unsettled.before)) {
    note_all<Act::kRead>(address, bytes);
    return;
  }
  std::memcpy(unsettled.before, reinterpret_cast<const void*>(address), bytes);
  unsettled.bytes = bytes;
  unsettled.address = address;
}

void reserve_shared(uintptr_t address) {
  write_shared(address, kAsyncBytes, kAsyncBytes);
  set_reserved(address, true);
}

void land_shared(uintptr_t address) {
  set_reserved(address, false);
  note_all<Act::kWrite>(address, kAsyncBytes);
}

void abandon_shared(uintptr_t address) { set_reserved(address, false); }

}  // namespace rapshee::cuda::emu
