"""The network: a frozen DINOv2 transformer, adapters, embeddings and the head."""

from __future__ import annotations

import os

from lorat.files.home import home, home_problem

CODE_CACHE = "TORCHINDUCTOR_CACHE_DIR"
"""Variable that names the folder in which torch, and Triton for it, keep compiled code."""

if CODE_CACHE not in os.environ and home_problem() is None:
    # Here later runs find it.  An import of torch's compiler, as timm's, would settle on another
    # folder, so it is set before; in the workers too, to the home folder of each one's machine.
    os.environ[CODE_CACHE] = str(home().absolute() / "compiled")
