"""Where the tests that need recorded videos and published results find them.

The environment variable ``LORAT_REAL_DATA`` names the folder; without it, it is the folder
``shared/data`` beside the checkout.  Tests are skipped where what they need is not there.
"""

from __future__ import annotations

import os
from pathlib import Path

_BESIDE = Path(__file__).resolve().parents[1].parent / "shared" / "data"
REAL_DATA = Path(os.environ.get("LORAT_REAL_DATA") or _BESIDE)
