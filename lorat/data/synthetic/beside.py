"""Collages drawn in processes beside the one that trains on them."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from lorat.config.variants import get_variant
from lorat.data.pairs.batches import Batch
from lorat.data.synthetic.collage import Collage
from lorat.data.synthetic.material import Material

_AHEAD = 4
"""Batches that a process has ready."""


def draw_beside(
    piles: Path, variant: str, batch_size: int, drawers: int, start_step: int
) -> Generator[Batch, None, None]:
    """Yield the batches of every step from ``start_step`` on, drawn in other processes.

    They do not depend on the number of processes.
    """
    context = multiprocessing.get_context("spawn")
    queues = [context.Queue(_AHEAD) for _ in range(drawers)]
    processes = [
        context.Process(
            target=_draw_for_ever,
            args=(piles, variant, batch_size, start_step + number, drawers, queue),
            daemon=True,
        )
        for number, queue in enumerate(queues)
    ]
    for process in processes:
        process.start()
    try:
        while True:
            for process, queue in zip(processes, queues, strict=True):
                while queue.empty() and process.is_alive():
                    time.sleep(0.002)
                if queue.empty():
                    raise RuntimeError(
                        f"A process that draws pairs ended (exit code {process.exitcode})."
                    )
                yield queue.get()
    finally:
        for process in processes:
            process.kill()  # it holds nothing that must be put away
            process.join()


def _draw_for_ever(
    piles: Path, variant: str, batch_size: int, step: int, stride: int, queue: Any
) -> None:
    cv2.setNumThreads(1)
    collage = Collage(Material.open(piles), get_variant(variant))
    while True:
        queue.put(collage.load(np.arange(step * batch_size, (step + 1) * batch_size)))
        step += stride
