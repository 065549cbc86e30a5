"""``python tests/fuzz/fuzz_safetensors.py -max_total_time=300``; see `fuzz.script`."""

from fuzz.script import instrumented, run

with instrumented():
    from fuzz.targets import fuzz_safetensors

if __name__ == "__main__":
    run(fuzz_safetensors)
