"""Blocks of random bytes and what the ``gguf`` package, ggml's own, reads from them.

    python tests/golden/make_quant_blocks.py

writes ``quant_blocks.npz``: for each dtype its bytes (u8) and, as ``<dtype>_values``, f32.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

DTYPES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
# (bytes of a block, where its float16 numbers lie)
LAYOUTS = {
    "q4_0": (18, [0]), "q4_1": (20, [0, 2]), "q5_0": (22, [0]), "q5_1": (24, [0, 2]),
    "q8_0": (34, [0]), "q2_k": (84, [80, 82]), "q3_k": (110, [108]), "q4_k": (144, [0, 2]),
    "q5_k": (176, [0, 2]), "q6_k": (210, [208]),
}  # fmt: skip


def main() -> None:
    random = np.random.default_rng(0)
    arrays = {}
    for dtype in DTYPES:
        nbytes, halves = LAYOUTS[dtype]
        blocks = random.integers(0, 256, (2, nbytes), dtype=np.uint8)
        for at in halves:
            blocks[:, at + 1] &= 0xBF  # finite
        arrays[dtype] = blocks.reshape(-1)
        kind = GGMLQuantizationType[dtype.upper()]
        arrays[f"{dtype}_values"] = dequantize(blocks.reshape(-1), kind).astype(np.float32)
    np.savez_compressed(Path(__file__).parent / "quant_blocks.npz", **arrays)


if __name__ == "__main__":
    main()
