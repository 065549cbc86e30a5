#!/usr/bin/env bash
# Everything that only a GPU can answer: builds, tests, checks and measures there, and prints a
# table last.
#
# Usage: bench/gpu.sh [build|test|sanitize|ceilings|kernels|engine|peers]...     all without arguments
#   build      pip install with the CUDA backend for this generation of GPUs (sm_90a)
#   test       tests of single kernels, of the runner and end to end, on the GPU
#   sanitize   compute-sanitizer: memcheck and racecheck on small shapes of every kernel
#   ceilings   copy, read, matrix product, launch latencies: what the GPU can do at most
#   kernels    each kernel on the shapes of Llama-3.1-8B and Qwen3-0.6B, beside torch
#   engine     both models with random weights: decode, prefill, a mixed workload, start-up
#   peers      transformers on the same shapes and weights
#
# Needs an NVIDIA driver, CUDA 13, Python 3.10 or later with numpy, pybind11, scikit-build-core,
# CMake, Ninja and pytest; torch and transformers for the figures beside ours. No network.
# Every part takes less than 10 minutes; each of its steps has a limit of its own, and one that
# fails stops no other. The exit status is 1 where any failed.
#
#   OUT             folder of the results: six files of JSON lines and text, and table.txt
#                   (bench/results/<date>-<device>)
#   PYTHON          the interpreter (python3)
#   RAPSHEE_COMMIT  the commit, where this is no repository
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
exec </dev/null

ALL_PARTS=(build test sanitize ceilings kernels engine peers)
PYTHON=${PYTHON:-python3}
CONFIGS=(qwen3-0.6b llama-3.1-8b)
KERNELS=(decode_attention prefill_attention linear sampling elementwise)

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0" >&2; }

# step LIMIT NAME COMMAND...: runs it for LIMIT seconds at most. Its output goes to the log, and to
# the terminal too: all of it where $SHOW is all, else its end.
step() {
  local limit=$1 name=$2 start=$SECONDS status output seconds
  shift 2
  output=$(mktemp)
  printf '\n=== %s (at most %s s): %s\n' "$name" "$limit" "$*"
  if [[ ${SHOW:-end} == all ]]; then
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$output"
    status=${PIPESTATUS[0]}
  else
    timeout --kill-after=10 "$limit" "$@" >"$output" 2>&1
    status=$?
    if ((status == 0)); then tail -n 5 "$output"; else tail -n 60 "$output"; fi
  fi
  seconds=$((SECONDS - start))
  printf '=== %s: exit status %s after %s s\n' "$name" "$status" "$seconds"
  {
    printf '\n=== %s: %s\n' "$name" "$*"
    tail -c 1000000 "$output"
    printf '=== exit status %s after %s s\n' "$status" "$seconds"
  } >>"$OUT/log.txt"
  printf '{"step": "%s", "status": %s, "seconds": %s}\n' "$name" "$status" "$seconds" \
    >>"$OUT/steps.jsonl"
  rm -f "$output"
  ((status == 0)) || failed=1
  return "$status"
}

# What is not there, as a step that failed.
missing() {
  printf '\n=== %s: %s\n' "$1" "$2" | tee -a "$OUT/log.txt"
  printf '{"step": "%s", "status": 127, "seconds": 0}\n' "$1" >>"$OUT/steps.jsonl"
  failed=1
}

build() {
  step 540 build env "CMAKE_BUILD_PARALLEL_LEVEL=$(nproc)" \
    "$PYTHON" -m pip install -v --no-index --no-deps --no-build-isolation --force-reinstall . \
    -C cmake.define.RAPSHEE_CUDA=ON -C cmake.define.RAPSHEE_CUDA_OPS=ON \
    -C cmake.define.CMAKE_CUDA_ARCHITECTURES=90a
  step 40 import "$PYTHON" -c '
from rapshee_engine import _core, _cuda_ops
devices = _core.list_devices()
print(_core.build_info(), devices)
assert any(name.startswith("cuda:") for name in devices), "the GPU is not among the devices"'
}

# The project is tested for warnings elsewhere, with the packages that it names.
run_tests() {
  local limit=$1 name=$2
  shift 2
  step "$limit" "$name" env RAPSHEE_TEST_DEVICES=cuda PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 \
    "PYTHONPATH=$PWD/bench${PYTHONPATH:+:$PYTHONPATH}" \
    "$PYTHON" -m pytest -q -ra --tb=short -o filterwarnings=default -p no:cacheprovider \
    -p gpu_tests "$@"
}

run_all_tests() {
  run_tests 240 "test kernels" tests/cuda
  run_tests 200 "test runner" tests/runner tests/engine/test_runner.py
  run_tests 120 "test end to end" tests/end_to_end
}

sanitize() {
  local sanitizer tool kernel
  sanitizer=$(PATH="$PATH:/usr/local/cuda/bin:/usr/local/cuda/compute-sanitizer" \
    command -v compute-sanitizer)
  if [[ -z $sanitizer ]]; then
    missing sanitize "compute-sanitizer is neither on the PATH nor in /usr/local/cuda"
    return
  fi
  for tool in memcheck racecheck; do
    for kernel in "${KERNELS[@]}"; do
      step 57 "$tool $kernel" "$sanitizer" --tool "$tool" --error-exitcode 9 \
        --target-processes application-only \
        "$PYTHON" "bench/cuda/bench_$kernel.py" --small --no-torch
    done
  done
}

ceilings() {
  rm -f "$OUT/ceilings.jsonl"
  SHOW=all step 120 ceilings "$PYTHON" bench/cuda/measure_ceilings.py --json "$OUT/ceilings.jsonl"
}

# Every figure stands beside the ceilings of the same run.
need_ceilings() { [[ -s $OUT/ceilings.jsonl ]] || ceilings; }

kernels() {
  local kernel
  local -A limits=([decode_attention]=140 [prefill_attention]=60 [linear]=190 [sampling]=80
    [elementwise]=60)
  need_ceilings
  for kernel in "${KERNELS[@]}"; do
    SHOW=all step "${limits[$kernel]}" "kernel $kernel" "$PYTHON" "bench/cuda/bench_$kernel.py" \
      --json "$OUT/kernels.jsonl" --ceilings "$OUT/ceilings.jsonl"
  done
}

engine() {
  local config case
  local -A limits=([qwen3-0.6b decode]=60 [qwen3-0.6b prefill]=35 [qwen3-0.6b workload]=50
    [qwen3-0.6b startup]=35 [qwen3-0.6b both]=50
    [llama-3.1-8b decode]=90 [llama-3.1-8b prefill]=50 [llama-3.1-8b workload]=100
    [llama-3.1-8b startup]=50 [llama-3.1-8b both]=75)
  need_ceilings
  for config in "${CONFIGS[@]}"; do
    for case in decode prefill workload startup; do
      SHOW=all step "${limits[$config $case]}" "engine $config $case" \
        "$PYTHON" bench/bench_engine.py --device cuda --config "$config" --case "$case" \
        --json "$OUT/engine.jsonl" --ceilings "$OUT/ceilings.jsonl"
    done
    # What determinism costs.
    SHOW=all step "${limits[$config both]}" "engine $config, not deterministic" "$PYTHON" bench/bench_engine.py \
      --device cuda --config "$config" --no-deterministic --case decode --case prefill \
      --json "$OUT/engine.jsonl" --ceilings "$OUT/ceilings.jsonl"
  done
}

peers() {
  local config
  need_ceilings
  for config in "${CONFIGS[@]}"; do
    SHOW=all step 270 "peers $config" "$PYTHON" bench/cuda/bench_transformers.py \
      --config "$config" --json "$OUT/peers.jsonl" --ceilings "$OUT/ceilings.jsonl"
  done
}

parts=("$@")
((${#parts[@]})) || parts=("${ALL_PARTS[@]}")
for part in "${parts[@]}"; do
  if [[ " ${ALL_PARTS[*]} " != *" $part "* ]]; then
    usage
    [[ $part == --help || $part == -h ]] && exit 0
    printf '\nunknown part: %s\n' "$part" >&2
    exit 2
  fi
done

if ! command -v nvcc >/dev/null && [[ -x /usr/local/cuda/bin/nvcc ]]; then
  export PATH="$PATH:/usr/local/cuda/bin"
fi
export PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
device=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)
slug=$(tr -cs '[:alnum:]' '-' <<<"${device:-no gpu}" | tr '[:upper:]' '[:lower:]')
OUT=${OUT:-bench/results/$(date +%F)-${slug%-}}
mkdir -p "$OUT" || exit 1
OUT=$(cd "$OUT" && pwd)
failed=0

for part in "${parts[@]}"; do
  printf '\n##### %s\n' "$part"
  case $part in
    build) build ;;
    test) run_all_tests ;;
    sanitize) sanitize ;;
    ceilings) ceilings ;;
    kernels) kernels ;;
    engine) engine ;;
    peers) peers ;;
  esac
done
printf '\n##### results in %s\n\n' "$OUT"
"$PYTHON" bench/gpu_table.py "$OUT" 2>&1 | tee "$OUT/table.txt"
exit "$failed"
