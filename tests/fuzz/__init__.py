"""Fuzzing: what is run (`targets`), how valid files are broken (`mutations`), and scripts that go
on for as long as somebody likes (``fuzz_*.py``, with `atheris`)."""
