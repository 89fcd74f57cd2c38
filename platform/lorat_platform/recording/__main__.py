"""Deliver or list what MLflow has not taken: ``python -m lorat_platform.recording replay|list``."""

from __future__ import annotations

import os
import sys

from lorat_platform.recording.backlog import main

os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
sys.exit(main(sys.argv[1:]))
