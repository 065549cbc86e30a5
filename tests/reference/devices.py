"""The devices that tests run on: the CPU and, where the build and the machine have one, a GPU.

``RAPSHEE_TEST_DEVICES`` (comma separated) restricts them.
"""

from __future__ import annotations

import os

from rapshee_engine import _core

__all__ = ["OTHER_DEVICES", "TEST_DEVICES", "TEST_KERNELS", "is_emulated", "native_dtype"]


def _test_devices() -> tuple[str, ...]:
    here = _core.list_devices()
    # Several GPUs of one machine run the same code.
    chosen = ["cpu", *[name for name in here if name.startswith("cuda")][:1]]
    asked = os.environ.get("RAPSHEE_TEST_DEVICES")
    if asked is None:
        return tuple(chosen)
    names = tuple(name.strip() for name in asked.split(","))
    for name in names:
        _core.device_dtypes(name)  # says what there is instead, if there is no such device
    return names


TEST_DEVICES = _test_devices()

OTHER_DEVICES = tuple(name for name in TEST_DEVICES if name != "cpu")
"""Those that are compared with the CPU."""

TEST_KERNELS = tuple(
    (device, isa)
    for device in TEST_DEVICES
    for isa in (_core.build_info()["isas"] if device == "cpu" else ("",))
)
"""Each device, the CPU once for each of its instruction sets."""


def is_emulated(device: str) -> bool:
    """Whether steps are so slow that a test has to do with few tokens."""
    return device.startswith("cuda-emu")


def native_dtype(device: str) -> str:
    """What unquantised matrices of a checkpoint are stored in, so that the device computes in it:
    its most exact dtype."""
    return "f32" if "float32" in _core.device_dtypes(device) else "bf16"
