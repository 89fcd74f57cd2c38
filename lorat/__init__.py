"""LoRAT: a visual object tracker that adapts a frozen DINOv2 ViT with LoRA (ECCV 2024)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorat.tracking.tracker import Tracker

__all__ = ["Tracker"]


def __getattr__(name: str) -> object:
    """Import the tracker on first use, since decode workers must not import torch."""
    if name == "Tracker":
        return importlib.import_module("lorat.tracking.tracker").Tracker
    raise AttributeError(f"module {__name__} has no attribute {name}")
