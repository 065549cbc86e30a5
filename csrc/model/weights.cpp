#include "model/weights.h"

#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <map>
#include <set>

#include "core/error.h"
#include "core/file_reader.h"
#include "core/hash.h"
#include "model/random_weights.h"
#include "quant/formats.h"

namespace rapshee {
namespace {

std::span<const std::byte> bytes_of(const std::string& s) {
  return std::as_bytes(std::span(s.data(), s.size()));
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text;
  for (int64_t n : shape) text += (text.empty() ? "" : ", ") + std::to_string(n);
  return "[" + text + "]";
}

// Reads the tensors of a checkpoint one by one, counting and hashing what it reads.
class Loader {
 public:
  Loader(const ModelConfig& config, const std::vector<TensorEntry>& entries, Backend& backend,
         const Progress& progress)
      : config_(config), backend_(backend), progress_(progress) {
    for (const TensorEntry& entry : entries) {
      if (!entries_.emplace(entry.name, &entry).second) {
        throw WeightError("named twice", entry.name, entry.file);
      }
      total_ += static_cast<uint64_t>(entry.nbytes);
    }
  }

  ModelWeights load() {
    ModelWeights w;
    const int64_t hidden = config_.hidden_size, inner = config_.intermediate_size;
    w.embed = matrix("embed.weight", config_.vocab_size, hidden);
    for (int i = 0; i < config_.num_layers(); ++i) {
      const std::string at = "layers." + std::to_string(i) + ".";
      LayerWeights& layer = w.layers.emplace_back();
      if (config_.pre_norm) layer.attn_norm = norm(at + "attn_norm", hidden);
      layer.q =
          linear(at + "q", config_.q_size(), hidden, config_.qkv_bias, config_.interleaved_qk);
      layer.k =
          linear(at + "k", config_.kv_size(), hidden, config_.qkv_bias, config_.interleaved_qk);
      layer.v = linear(at + "v", config_.kv_size(), hidden, config_.qkv_bias);
      if (config_.qk_norm != QkNorm::kNone) {
        layer.q_norm = norm(at + "q_norm", config_.q_norm_size());
        layer.k_norm = norm(at + "k_norm", config_.k_norm_size());
      }
      layer.out = linear(at + "o", hidden, config_.q_size(), config_.out_bias);
      if (config_.post_norm) layer.attn_post_norm = norm(at + "attn_post_norm", hidden);
      if (config_.pre_norm) layer.mlp_norm = norm(at + "mlp_norm", hidden);
      layer.gate = linear(at + "gate", inner, hidden, config_.mlp_bias);
      layer.up = linear(at + "up", inner, hidden, config_.mlp_bias);
      layer.down = linear(at + "down", hidden, inner, config_.mlp_bias);
      if (config_.post_norm) layer.mlp_post_norm = norm(at + "mlp_post_norm", hidden);
    }
    w.final_norm = norm("final_norm", hidden);
    if (!config_.tie_embeddings) w.untied_head = matrix("head.weight", config_.vocab_size, hidden);
    if (!entries_.empty()) {
      const TensorEntry& extra = *entries_.begin()->second;
      throw WeightError("the model has no such tensor", extra.name, extra.file);
    }
    w.checksum = checksum_;
    w.bytes = bytes_;
    w.all_f32 = all_f32_;
    return w;
  }

 private:
  LinearWeight linear(const std::string& name, int64_t rows, int64_t cols, bool bias,
                      bool interleaved = false) {
    LinearWeight out;
    out.weight = matrix(name + ".weight", rows, cols, interleaved);
    if (bias) out.bias = vector(name + ".bias", rows, interleaved);
    return out;
  }

  std::unique_ptr<Weight> matrix(const std::string& name, int64_t rows, int64_t cols,
                                 bool interleaved = false) {
    const TensorEntry entry = take(name, {rows, cols});
    all_f32_ = all_f32_ && entry.dtype == DType::kF32;
    return finish(entry, backend_.load_matrix(source(entry, rows, cols, interleaved)));
  }

  // Read as f32, so that the 1 which some families leave out is added without rounding.
  std::unique_ptr<Weight> norm(const std::string& name, int64_t n) {
    const TensorEntry entry = take(name + ".weight", {n});
    WeightSource from = source(entry, 1, n, false);
    if (config_.norm_zero_centered && !entry.file.empty()) {
      from.dtype = DType::kF32;
      from.read_rows = [read = from.read_rows, dtype = entry.dtype, n](int64_t, int64_t,
                                                                       std::byte* dst) {
        std::vector<std::byte> raw(static_cast<size_t>(row_bytes(dtype, n)));
        std::vector<float> values(static_cast<size_t>(n));
        read(0, 1, raw.data());
        dequantize_row(dtype, raw.data(), values.data(), n);
        for (float& value : values) value += 1.0f;
        std::memcpy(dst, values.data(), values.size() * sizeof(float));
      };
    }
    return finish(entry, backend_.load_vector(from));
  }

  std::unique_ptr<Weight> vector(const std::string& name, int64_t n, bool interleaved = false) {
    const TensorEntry entry = take(name, {n});
    if (interleaved && is_quantized(entry.dtype)) {
      throw WeightError(concat(dtype_name(entry.dtype), " blocks of a pairwise stored bias cannot ",
                               "be put in order; expected f32, f16 or bf16"),
                        name, entry.file);
    }
    // A permuted bias is read element by element, as rows of one.
    WeightSource from = source(entry, interleaved ? n : 1, interleaved ? 1 : n, interleaved);
    if (interleaved) {
      from.read_rows = [rows = from.read_rows, n](int64_t, int64_t, std::byte* dst) {
        rows(0, n, dst);
      };
      from.rows = 1;
      from.cols = n;
    }
    return finish(entry, backend_.load_vector(from));
  }

  TensorEntry take(const std::string& name, const std::vector<int64_t>& shape) {
    const auto it = entries_.find(name);
    if (it == entries_.end()) throw WeightError("missing", name);
    const TensorEntry entry = *it->second;
    entries_.erase(it);
    const auto fail = [&](const std::string& why) { throw WeightError(why, name, entry.file); };
    if (entry.shape != shape) {
      fail("shape is " + shape_text(entry.shape) + ", expected " + shape_text(shape));
    }
    const int64_t cols = shape.back(), rows = shape.size() == 2 ? shape[0] : 1;
    if (cols % block_elements(entry.dtype) != 0) {
      fail("rows of " + std::to_string(cols) + " elements are no whole " +
           std::string(dtype_name(entry.dtype)) + " blocks");
    }
    const int64_t expected = rows * row_bytes(entry.dtype, cols);
    if (entry.nbytes != expected || entry.offset < 0) {
      fail("takes " + std::to_string(entry.nbytes) + " bytes at " + std::to_string(entry.offset) +
           ", expected " + std::to_string(expected) + " bytes");
    }
    return entry;
  }

  WeightSource source(const TensorEntry& entry, int64_t rows, int64_t cols, bool interleaved) {
    const uint64_t key = xxh64(bytes_of(entry.name), static_cast<uint64_t>(entry.dtype));
    if (entry.file.empty()) return random_source(entry, rows, cols, key);
    const auto read = file_rows(entry, cols);
    const int64_t size = row_bytes(entry.dtype, cols);
    const int64_t dim = config_.head_dim;
    const auto read_rows = [=, this](int64_t begin, int64_t end, std::byte* dst) {
      if (!interleaved) {
        read(begin, end, dst);
      } else {
        // Row i of a head's first half is stored as 2 i, row i of its second half as 2 i + 1.
        for (int64_t r = begin; r < end; ++r, dst += size) {
          const int64_t i = r % dim;
          const int64_t stored = i < dim / 2 ? 2 * i : 2 * (i - dim / 2) + 1;
          read(r - i + stored, r - i + stored + 1, dst);
        }
        dst -= (end - begin) * size;
      }
      // A sum over rows: the same however the rows are shared out between threads.
      uint64_t sum = 0;
      for (int64_t r = begin; r < end; ++r) {
        const std::byte* row = dst + (r - begin) * size;
        sum += xxh64({row, static_cast<size_t>(size)}, key + static_cast<uint64_t>(r));
      }
      checksum_ += sum;
    };
    return {entry.name, entry.dtype, rows, cols, read_rows};
  }

  using ReadRows = std::function<void(int64_t, int64_t, std::byte*)>;

  ReadRows file_rows(const TensorEntry& entry, int64_t cols) {
    const auto found = files_.find(entry.file);
    const FileReader& file = found != files_.end()
                                 ? found->second
                                 : files_.emplace(entry.file, FileReader(entry.file)).first->second;
    // Known before anything is allocated for it, and no sum below can overflow.
    if (entry.offset > file.size() || entry.nbytes > file.size() - entry.offset) {
      throw WeightError(concat("bytes ", entry.offset, " + ", entry.nbytes,
                               " lie outside the file of ", file.size(), " bytes"),
                        entry.name, entry.file);
    }
    const int64_t size = row_bytes(entry.dtype, cols);
    return [&file, offset = entry.offset, size, name = entry.name](int64_t begin, int64_t end,
                                                                   std::byte* dst) {
      try {
        file.read(offset + begin * size, {dst, static_cast<size_t>((end - begin) * size)});
      } catch (const WeightError& e) {
        throw WeightError(e.reason(), name, e.file());
      }
    };
  }

  // Norms are 1, matrices random; the same for every layout of the weights.
  WeightSource random_source(const TensorEntry& entry, int64_t rows, int64_t cols, uint64_t key) {
    if (is_quantized(entry.dtype)) {
      throw WeightError(
          "random weights come as f32, f16 or bf16, not " + std::string(dtype_name(entry.dtype)),
          entry.name);
    }
    checksum_ += key;
    const bool norm = entry.name.find("norm.") != std::string::npos;
    const auto read_rows = [=, dtype = entry.dtype](int64_t begin, int64_t end, std::byte* dst) {
      for (int64_t i = begin * cols; i < end * cols; ++i) {
        const float x = norm ? 1.0f : random_weight(key, static_cast<uint64_t>(i), cols);
        const uint16_t half = dtype == DType::kBF16 ? f32_to_bf16(x) : f32_to_f16(x);
        const size_t size = dtype == DType::kF32 ? sizeof x : sizeof half;
        std::memcpy(dst, dtype == DType::kF32 ? static_cast<const void*>(&x) : &half, size);
        dst += size;
      }
    };
    WeightSource source{entry.name, entry.dtype, rows, cols, read_rows};
    if (!norm) source.random_key = key;
    return source;
  }

  std::unique_ptr<Weight> finish(const TensorEntry& entry, std::unique_ptr<Weight> weight) {
    bytes_ += weight->bytes();
    done_ += static_cast<uint64_t>(entry.nbytes);
    if (progress_) progress_(done_, total_);
    return weight;
  }

  const ModelConfig& config_;
  Backend& backend_;
  const Progress& progress_;
  std::map<std::string, const TensorEntry*> entries_;  // not yet taken
  std::map<std::string, FileReader> files_;
  uint64_t done_ = 0, total_ = 0;  // bytes
  size_t bytes_ = 0;
  bool all_f32_ = true;
  std::atomic<uint64_t> checksum_{0};
};

}  // namespace

ModelWeights load_weights(const ModelConfig& config, const std::vector<TensorEntry>& entries,
                          Backend& backend, const Progress& progress) {
  return Loader(config, entries, backend, progress).load();
}

}  // namespace rapshee
