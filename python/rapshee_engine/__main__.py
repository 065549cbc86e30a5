"""``python -m rapshee_engine``."""

from __future__ import annotations

import sys

from rapshee_engine.cli import main

sys.exit(main())
