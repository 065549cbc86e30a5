"""Tests of single kernels: there where the build has them, and wherever they are asked for."""

from __future__ import annotations

import os
from importlib.util import find_spec

_IS_BUILT = find_spec("rapshee_engine._cuda_ops") is not None

collect_ignore_glob = [] if _IS_BUILT or "RAPSHEE_TEST_DEVICES" in os.environ else ["test_*.py"]
