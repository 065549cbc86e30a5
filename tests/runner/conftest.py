from __future__ import annotations

from reference.devices import OTHER_DEVICES

_OF_OTHER_DEVICES = ["test_device_faults.py", "test_devices_agree.py", "test_not_deterministic.py"]

collect_ignore = [] if OTHER_DEVICES else _OF_OTHER_DEVICES
