// Lists of tensors that do not fit their files, and files that do not fit their lists: some
// thousand of them, by a fixed generator. Each is refused by a WeightError or gives a model; under
// sanitizers nothing is read or written that is not there. Files are small, so memory that a list
// claims and no file has would show as well.
#include <array>
#include <cstdint>
#include <filesystem>
#include <iterator>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "core/dtype.h"
#include "core/error.h"
#include "model/weights.h"
#include "quant/formats.h"
#include "runner/model_runner.h"
#include "temp_folder.h"

namespace rapshee {
namespace {

using testing::TempFolder;

// Those that tensors may have; i8, of caches alone, comes after them.
constexpr size_t kNumDTypes = static_cast<size_t>(DType::kI8);

// xorshift64
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t next() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return state_;
  }
  size_t below(size_t n) { return static_cast<size_t>(next() >> 16) % n; }

  DType dtype() { return static_cast<DType>(below(kNumDTypes)); }

  template <class T, size_t N>
  T one_of(const std::array<T, N>& values) {
    return values[below(N)];
  }

 private:
  uint64_t state_;
};

ModelConfig tiny_config() {
  ModelConfig config;
  config.vocab_size = 65;
  config.hidden_size = 32;
  config.intermediate_size = 32;
  config.num_heads = 2;
  config.num_kv_heads = 1;
  config.head_dim = 16;
  config.max_position = 64;
  config.rms_norm_eps = 1e-5f;
  config.query_scale = 0.25f;
  config.tie_embeddings = true;
  config.qkv_bias = true;
  config.interleaved_qk = true;
  config.ropes = {Rope{{1.0f, 0.5f}, 1.0f}};
  config.layers = {LayerConfig{}};
  return config;
}

// The tensors of `config`, one after the other in one file of arbitrary bytes.
struct Checkpoint {
  explicit Checkpoint(const ModelConfig& config) {
    const int64_t hidden = config.hidden_size, inner = config.intermediate_size;
    add("embed.weight", {config.vocab_size, hidden});
    add("layers.0.attn_norm.weight", {hidden});
    const std::pair<const char*, int64_t> projections[] = {
        {"q", config.q_size()}, {"k", config.kv_size()}, {"v", config.kv_size()}};
    for (const auto& [name, rows] : projections) {
      add(concat("layers.0.", name, ".weight"), {rows, hidden});
      add(concat("layers.0.", name, ".bias"), {rows});
    }
    add("layers.0.o.weight", {hidden, config.q_size()});
    add("layers.0.mlp_norm.weight", {hidden});
    add("layers.0.gate.weight", {inner, hidden});
    add("layers.0.up.weight", {inner, hidden});
    add("layers.0.down.weight", {hidden, inner});
    add("final_norm.weight", {hidden});
    Random random(7);
    std::string bytes(static_cast<size_t>(size), '\0');
    for (char& byte : bytes) byte = static_cast<char>(random.next());
    file = folder.write("model.bin", bytes);
    short_file = folder.write("short.bin", bytes.substr(0, bytes.size() / 2));
    folder.write("empty.bin", "");
    for (TensorEntry& entry : entries) entry.file = file;
  }

  void add(const std::string& name, std::vector<int64_t> shape) {
    int64_t nbytes = 4;
    for (const int64_t n : shape) nbytes *= n;
    entries.push_back({name, DType::kF32, std::move(shape), "", size, nbytes});
    size += nbytes;
  }

  TempFolder folder;
  std::string file, short_file;
  std::vector<TensorEntry> entries;
  int64_t size = 0;
};

constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
constexpr std::array<int64_t, 16> kEdges = {0,
                                            1,
                                            -1,
                                            31,
                                            33,
                                            64,
                                            int64_t{1} << 31,
                                            -kMost - 1,
                                            int64_t{1} << 32,
                                            int64_t{1} << 61,
                                            int64_t{1} << 62,
                                            kMost - 1,
                                            kMost,
                                            kMost / 2 + 1,
                                            -(int64_t{1} << 31),
                                            4096};

void mutate(std::vector<TensorEntry>& entries, const Checkpoint& from, Random& random) {
  TensorEntry& entry = entries[random.below(entries.size())];
  const TensorEntry& other = from.entries[random.below(from.entries.size())];
  switch (random.below(10)) {
    case 0:
      entry.offset = random.one_of(kEdges);
      break;
    case 1:
      entry.offset += static_cast<int64_t>(random.below(64)) - 32;
      break;
    case 2:
      entry.nbytes = random.one_of(kEdges);
      break;
    case 3:
      entry.shape[random.below(entry.shape.size())] = random.one_of(kEdges);
      break;
    case 4:
      entry.shape.resize(random.below(5), random.one_of(kEdges));
      if (entry.shape.empty()) entry.shape = {1};
      break;
    case 5: {  // as many bytes as the other dtype takes: the list is consistent
      entry.dtype = random.dtype();
      const int64_t cols = entry.shape.back();
      const bool fits = cols > 0 && cols % block_elements(entry.dtype) == 0 && cols < 4096;
      if (fits) entry.nbytes = entry.nbytes / 4 / cols * row_bytes(entry.dtype, cols);
      break;
    }
    case 6:
      entry.name = random.below(2) == 0 ? other.name : entry.name + "x";
      break;
    case 7:
      entries.push_back(other);
      entries.back().file = from.file;
      break;
    case 8:
      if (entries.size() > 1)
        entries.erase(entries.begin() + static_cast<long>(random.below(entries.size())));
      break;
    default: {
      const std::array<std::string, 5> files = {from.short_file, from.folder.path(),
                                                from.folder.path() + "/absent",
                                                from.folder.path() + "/empty.bin", ""};
      entry.file = random.one_of(files);
    }
  }
}

// Whether the list gives a model; anything but a WeightError is a failure of the test.
bool loads(const ModelConfig& config, const std::vector<TensorEntry>& entries) {
  const RunnerOptions options{
      .num_blocks = {1}, .block_size = 16, .max_num_tokens = 1, .max_num_seqs = 1, .threads = 2};
  try {
    ModelRunner(config, entries, options, nullptr);
    return true;
  } catch (const WeightError& error) {
    CHECK(!error.reason().empty());
    return false;
  }
}

TEST_CASE(hostile_lists_are_refused_or_load) {
  const ModelConfig config = tiny_config();
  const Checkpoint checkpoint(config);
  CHECK(loads(config, checkpoint.entries));
  Random random(0x9E3779B97F4A7C15u);
  int loaded = 0;
  constexpr int kLists = 2000;
  for (int i = 0; i < kLists; ++i) {
    std::vector<TensorEntry> entries = checkpoint.entries;
    const size_t edits = 1 + random.below(3);
    for (size_t edit = 0; edit < edits; ++edit) mutate(entries, checkpoint, random);
    loaded += loads(config, entries);
  }
  CHECK(loaded > kLists / 50);  // some edits are harmless: what passes the checks is read as well
  CHECK(loaded < kLists / 2);
}

TEST_CASE(every_entry_is_checked_against_the_end_of_its_file) {
  const ModelConfig config = tiny_config();
  const Checkpoint checkpoint(config);
  for (size_t i = 0; i < checkpoint.entries.size(); ++i) {
    std::vector<TensorEntry> entries = checkpoint.entries;
    TensorEntry& entry = entries[i];
    for (const int64_t offset : {checkpoint.size - entry.nbytes + 1, checkpoint.size, kMost,
                                 kMost - entry.nbytes + 1, int64_t{-1}}) {
      entry.offset = offset;
      CHECK(!loads(config, entries));
    }
    entry.offset = checkpoint.size - entry.nbytes;
    CHECK(loads(config, entries));
  }
}

TEST_CASE(files_that_shrink_while_they_are_read) {
  const ModelConfig config = tiny_config();
  for (const size_t stop : {size_t{0}, size_t{3}, size_t{10}}) {
    const Checkpoint checkpoint(config);
    size_t tensors = 0;
    const Progress shrink = [&](uint64_t, uint64_t) {
      if (tensors++ == stop) std::filesystem::resize_file(checkpoint.file, 64);
    };
    const RunnerOptions options{
        .num_blocks = {1}, .block_size = 16, .max_num_tokens = 1, .max_num_seqs = 1, .threads = 2};
    const std::string message =
        MESSAGE_OF(WeightError, ModelRunner(config, checkpoint.entries, options, shrink));
    CHECK(message.find("model.bin") != std::string::npos);
    CHECK(message.find("ends at byte") != std::string::npos);
  }
}

// Rows of arbitrary bytes, NaN and infinite scales among them, that end where their memory ends.
TEST_CASE(rows_of_any_bytes_stay_in_their_memory) {
  Random random(42);
  for (int i = 0; i < 3000; ++i) {
    const DType dtype = random.dtype();
    const auto n = static_cast<int64_t>(random.below(9)) * block_elements(dtype);
    std::vector<std::byte> row(static_cast<size_t>(row_bytes(dtype, n)));
    for (std::byte& byte : row) byte = static_cast<std::byte>(random.next() >> 24);
    std::vector<float> values(static_cast<size_t>(n));
    dequantize_row(dtype, row.data(), values.data(), n);
    if (n > 0 && block_elements(dtype) > 1) {
      MESSAGE_OF(InvalidArgument, dequantize_row(dtype, row.data(), values.data(), n - 1));
    }
  }
  for (size_t i = 0; i < kNumDTypes; ++i) {
    const auto dtype = static_cast<DType>(i);
    MESSAGE_OF(InvalidArgument, dequantize_row(dtype, nullptr, nullptr, -block_elements(dtype)));
  }
}

}  // namespace
}  // namespace rapshee

TEST_MAIN()
