"""``python tests/fuzz/fuzz_template.py -max_total_time=300``; see `fuzz.script`."""

from fuzz.script import instrumented, run

with instrumented():
    from fuzz.targets import fuzz_template

if __name__ == "__main__":
    run(fuzz_template)
