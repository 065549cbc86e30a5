from __future__ import annotations

from reference.devices import OTHER_DEVICES

collect_ignore = [] if OTHER_DEVICES else ["test_devices_agree.py", "test_not_deterministic.py"]
"""Without another device there is nothing to compare."""
