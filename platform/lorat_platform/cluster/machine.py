"""The machine that something is measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def device_name(asked: str = "auto") -> str:
    """Name what networks run on: the first GPU, or the processor where there is none.

    Args:
        asked: ``cpu`` means the processor in any case.
    """
    import torch

    if asked != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return processor_name()


def processor_name() -> str:
    """Name the processor, and how many of its cores this process may use."""
    name = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    return f"{len(os.sched_getaffinity(0))} cores of {name}"
