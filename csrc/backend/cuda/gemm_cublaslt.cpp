// gemm.h on cuBLASLt, which is opened when it is first asked for: neither the build nor a machine
// without it needs it. What is used of cublasLt.h is declared here; it is the same in versions 12
// and 13.
#include <dlfcn.h>

#include <array>
#include <bit>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "backend/cuda/gemm.h"
#include "core/error.h"

namespace rapshee::cuda {
namespace {

// -------------------------------------------------------------------------- of cublasLt.h
struct Context;
struct MatmulDesc;
struct MatrixLayout;
struct Preference;
struct Algorithm {
  uint64_t data[8];
};
struct HeuristicResult {
  Algorithm algorithm;
  size_t workspace_bytes;
  int status;
  float waves;
  int reserved[4];
};

constexpr int kSuccess = 0;                                       // cublasStatus_t
constexpr int kFloat = 0, kFloat16 = 2, kBFloat16 = 14;           // cudaDataType_t
constexpr int kComputeFloat = 68;                                 // cublasComputeType_t
constexpr int32_t kTransposed = 1;                                // cublasOperation_t
constexpr int kDescTransA = 3, kDescEpilogue = 7, kDescBias = 8;  // of MatmulDesc
constexpr uint32_t kEpilogueBias = 4;                             // cublasLtEpilogue_t
constexpr int kPreferenceWorkspace = 1;                           // of Preference
constexpr int kPreferenceAlignmentA = 5, kPreferenceAlignmentB = 6;
constexpr int kPreferenceAlignmentC = 7, kPreferenceAlignmentD = 8;

struct Functions {
  const char* (*status_string)(int status);
  int (*create)(Context** context);
  int (*destroy)(Context* context);
  int (*desc_create)(MatmulDesc** desc, int compute_type, int scale_type);
  int (*desc_destroy)(MatmulDesc* desc);
  int (*desc_set)(MatmulDesc* desc, int attribute, const void* value, size_t bytes);
  int (*layout_create)(MatrixLayout** layout, int type, uint64_t rows, uint64_t cols, int64_t ld);
  int (*layout_destroy)(MatrixLayout* layout);
  int (*preference_create)(Preference** preference);
  int (*preference_destroy)(Preference* preference);
  int (*preference_set)(Preference* preference, int attribute, const void* value, size_t bytes);
  int (*heuristic)(Context* context, MatmulDesc* desc, MatrixLayout* a, MatrixLayout* b,
                   MatrixLayout* c, MatrixLayout* d, Preference* preference, int requested,
                   HeuristicResult* results, int* returned);
  int (*matmul)(Context* context, MatmulDesc* desc, const void* alpha, const void* a,
                MatrixLayout* a_layout, const void* b, MatrixLayout* b_layout, const void* beta,
                const void* c, MatrixLayout* c_layout, void* d, MatrixLayout* d_layout,
                const Algorithm* algorithm, void* workspace, size_t workspace_bytes, Stream stream);
};

// --------------------------------------------------------------------------------- opening
// Names for the system's loader, then where pip puts the library: beside this package.
std::vector<std::string> library_names() {
  std::vector<std::string> names = {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"};
  Dl_info info{};
  if (dladdr(reinterpret_cast<const void*>(&make_gemm), &info) != 0 && info.dli_fname != nullptr) {
    const auto package = std::filesystem::path(info.dli_fname).parent_path();
    for (const char* name :
         {"nvidia/cu13/lib/libcublasLt.so.13", "nvidia/cublas/lib/libcublasLt.so.12"}) {
      names.push_back((package.parent_path() / name).string());
    }
  }
  return names;
}

[[noreturn]] void fail_opening(const std::string& problem) {
  throw DeviceError(concat("deterministic=False needs cuBLASLt: ", problem,
                           "; install it with 'pip install nvidia-cublas', or use "
                           "deterministic=True"));
}

Functions open_library() {
  void* library = nullptr;
  std::string problem;
  for (const std::string& name : library_names()) {
    library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library != nullptr) break;
    if (problem.empty()) problem = dlerror();
  }
  if (library == nullptr) fail_opening(problem);
  Functions functions;
  const auto load = [&](auto& function, const char* name) {
    void* symbol = dlsym(library, name);
    if (symbol == nullptr) fail_opening(dlerror());
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(symbol);
  };
  load(functions.status_string, "cublasLtGetStatusString");
  load(functions.create, "cublasLtCreate");
  load(functions.destroy, "cublasLtDestroy");
  load(functions.desc_create, "cublasLtMatmulDescCreate");
  load(functions.desc_destroy, "cublasLtMatmulDescDestroy");
  load(functions.desc_set, "cublasLtMatmulDescSetAttribute");
  load(functions.layout_create, "cublasLtMatrixLayoutCreate");
  load(functions.layout_destroy, "cublasLtMatrixLayoutDestroy");
  load(functions.preference_create, "cublasLtMatmulPreferenceCreate");
  load(functions.preference_destroy, "cublasLtMatmulPreferenceDestroy");
  load(functions.preference_set, "cublasLtMatmulPreferenceSetAttribute");
  load(functions.heuristic, "cublasLtMatmulAlgoGetHeuristic");
  load(functions.matmul, "cublasLtMatmul");
  return functions;
}

// The library stays open until the process ends.
const Functions& library() {
  static const Functions functions = open_library();
  return functions;
}

void check(int status, const char* doing) {
  if (status == kSuccess) return;
  throw DeviceError(
      concat("cuBLASLt, ", doing, ": ", library().status_string(status), " (status ", status, ")"));
}

// -------------------------------------------------------------------------------- products
template <class T>
class Owner {
 public:
  Owner(T* value, int (*destroy)(T*)) : value_(value, destroy) {}
  T* get() const { return value_.get(); }

 private:
  std::unique_ptr<T, int (*)(T*)> value_;
};

Owner<Context> make_context() {
  Context* context = nullptr;
  check(library().create(&context), "creation of a handle");
  return {context, library().destroy};
}

Owner<MatmulDesc> make_desc() {
  MatmulDesc* desc = nullptr;
  check(library().desc_create(&desc, kComputeFloat, kFloat), "description of a product");
  return {desc, library().desc_destroy};
}

// Of a row-major matrix, which to the library is its transpose.
Owner<MatrixLayout> make_layout(int type, int64_t rows, int64_t cols, int64_t stride) {
  MatrixLayout* layout = nullptr;
  check(library().layout_create(&layout, type, static_cast<uint64_t>(cols),
                                static_cast<uint64_t>(rows), stride),
        "layout of a matrix");
  return {layout, library().layout_destroy};
}

Owner<Preference> make_preference() {
  Preference* preference = nullptr;
  check(library().preference_create(&preference), "preferences of a product");
  return {preference, library().preference_destroy};
}

template <class T>
void set(MatmulDesc* desc, int attribute, const T& value) {
  check(library().desc_set(desc, attribute, &value, sizeof value), "attribute of a product");
}
template <class T>
void set(Preference* preference, int attribute, const T& value) {
  check(library().preference_set(preference, attribute, &value, sizeof value),
        "preference of a product");
}

// Largest power of two up to 256 that divides the address; of null 256.
uint32_t alignment_of(const void* pointer) {
  constexpr uintptr_t kMost = 256;
  return uint32_t{1} << std::countr_zero(reinterpret_cast<uintptr_t>(pointer) | kMost);
}

// All that the choice of an algorithm depends on.
struct Key {
  HalfType half;
  bool biased;
  int64_t rows, outputs, cols, x_stride, y_stride;
  std::array<uint32_t, 4> alignments;  // of weight, x, y, bias

  explicit Key(const GemmArgs& args)
      : half(args.half),
        biased(args.bias != nullptr),
        rows(args.rows),
        outputs(args.outputs),
        cols(args.cols),
        x_stride(args.x_stride),
        y_stride(args.y_stride),
        alignments{alignment_of(args.weight), alignment_of(args.x), alignment_of(args.y),
                   alignment_of(args.bias)} {}

  auto operator<=>(const Key&) const = default;
};

// A product as the library sees it, in columns: y^T [outputs, rows] = W [outputs, cols] x^T, with W
// given as its transpose. An element of the bias belongs to a row of y^T, as the epilogue has it.
class Plan {
 public:
  Plan(Context* context, const GemmArgs& args)
      : desc_(make_desc()),
        weight_(make_layout(half_of(args), args.outputs, args.cols, args.cols)),
        x_(make_layout(half_of(args), args.rows, args.cols, args.x_stride)),
        y_(make_layout(kFloat, args.rows, args.outputs, args.y_stride)) {
    set(desc_.get(), kDescTransA, kTransposed);
    if (args.bias != nullptr) {
      set(desc_.get(), kDescEpilogue, kEpilogueBias);
      set(desc_.get(), kDescBias, args.bias);
    }
    const Owner<Preference> preference = make_preference();
    set(preference.get(), kPreferenceWorkspace, Gemm::kWorkspaceBytes);
    set(preference.get(), kPreferenceAlignmentA, alignment_of(args.weight));
    set(preference.get(), kPreferenceAlignmentB, alignment_of(args.x));
    set(preference.get(), kPreferenceAlignmentC, alignment_of(args.y));
    set(preference.get(), kPreferenceAlignmentD, alignment_of(args.y));
    HeuristicResult best{};
    int found = 0;
    check(library().heuristic(context, desc_.get(), weight_.get(), x_.get(), y_.get(), y_.get(),
                              preference.get(), 1, &best, &found),
          "choice of an algorithm");
    if (found < 1)
      throw DeviceError("cuBLASLt has no algorithm for a product; use deterministic=True");
    check(best.status, "choice of an algorithm");
    algorithm_ = best.algorithm;
  }

  void run(Context* context, const GemmArgs& args, void* workspace, Stream stream) const {
    if (args.bias != nullptr) set(desc_.get(), kDescBias, args.bias);
    const float alpha = 1.0f, beta = 0.0f;
    check(library().matmul(context, desc_.get(), &alpha, args.weight, weight_.get(), args.x,
                           x_.get(), &beta, args.y, y_.get(), args.y, y_.get(), &algorithm_,
                           workspace, Gemm::kWorkspaceBytes, stream),
          "product");
  }

 private:
  static int half_of(const GemmArgs& args) {
    return args.half == HalfType::kBF16 ? kBFloat16 : kFloat16;
  }

  Owner<MatmulDesc> desc_;
  Owner<MatrixLayout> weight_, x_, y_;
  Algorithm algorithm_;
};

class CublasLtGemm final : public Gemm {
 public:
  CublasLtGemm() : context_(make_context()), workspace_(kWorkspaceBytes) {}

  void run(const GemmArgs& args, Stream stream) override {
    if (args.rows == 0 || args.outputs == 0) return;
    constexpr size_t kMost = 4096;  // of about a kilobyte each; prompts end in chunks of any length
    const Key key(args);
    auto found = plans_.find(key);
    if (found == plans_.end()) {
      if (plans_.size() >= kMost) plans_.clear();
      found = plans_.try_emplace(key, context_.get(), args).first;
    }
    found->second.run(context_.get(), args, workspace_.data(), stream);
  }

 private:
  Owner<Context> context_;
  DeviceMemory workspace_;
  std::map<Key, Plan> plans_;
};

}  // namespace

std::unique_ptr<Gemm> make_gemm() { return std::make_unique<CublasLtGemm>(); }

}  // namespace rapshee::cuda
