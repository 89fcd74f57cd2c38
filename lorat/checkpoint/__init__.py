"""Checkpoints as folders of safetensors and JSON: what training saves, and what others read."""

from lorat.checkpoint.folder import (
    load,
    load_merged,
    load_training_state,
    save,
    save_merged,
    save_training_state,
    warm_start,
)

__all__ = [
    "load",
    "load_merged",
    "load_training_state",
    "save",
    "save_merged",
    "save_training_state",
    "warm_start",
]
