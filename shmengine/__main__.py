"""``python -m shmengine``."""

from __future__ import annotations

import sys

from shmengine.cli import main

sys.exit(main())
