"""The tracker: one target in a video, or many videos in one batch.

A :class:`Target` holds all that belongs to one video, so a :class:`Tracker` serves any number of
them: ``start`` makes targets, ``step`` advances some of them by one frame each.  ``init`` and
``update`` are the same for a single video.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lorat.config.tracking import TrackingConfig
from lorat.errors import UserError
from lorat.image.boxes import Box, clip_box, enlarge_to_minimum, intersects
from lorat.image.codec import mean_rgb
from lorat.image.crops import CropParams, crop_params, foreground_mask, resample
from lorat.model.network import LoRAT
from lorat.model.normalisation import normalize_
from lorat.tracking.postprocess import box_in_frame, find_peak, hann_window, next_box


@dataclass(kw_only=True)
class Target:
    """One tracked object: its template and where it was seen last."""

    template_CHW: Tensor
    mask_hw: Tensor
    fill_rgb: np.ndarray
    """Mean colour of the first frame; fills search crops outside of the frame."""
    box: Box
    """Where to search next, in frame pixels."""


class Tracker:
    """Track objects given by a box in the first frame of their videos.

    Args:
        model: in training or deployable form; it is left as it is.
        device: by default CUDA where there is some.
        dtype: of the weights.  By default float32, on CUDA under float16 autocast as published.
        tracking: how to track; none means as the model says.

    Raises:
        UserError: if the device is not there.
    """

    def __init__(
        self,
        model: LoRAT,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        tracking: TrackingConfig | None = None,
    ):
        self.device = resolve_device(device)
        self.variant = model.variant
        self.tracking = tracking or model.tracking
        """How to track; may be changed between videos."""
        self._autocast = dtype is None and self.device.type == "cuda"
        self.dtype = dtype or torch.float32
        network = copy.deepcopy(model) if model.adaptation is None else model.merge()
        self.model = network.requires_grad_(False).eval().to(self.device, self.dtype)
        grid = self.variant.search_grid
        self._window_HW = hann_window(grid, grid, self.device)
        self._pool: ThreadPoolExecutor | None = None
        self._target: Target | None = None

    def init(self, frame: np.ndarray, box: Sequence[float]) -> None:
        """Start tracking an object.

        Args:
            frame: uint8 RGB (H, W, 3).
            box: xyxy in pixels of the frame.

        Raises:
            UserError: if the frame is no RGB image or the box is empty or outside of it.
        """
        (self._target,) = self.start([frame], [box])

    def update(self, frame: np.ndarray) -> tuple[np.ndarray, float]:
        """Find the object in the next frame.

        Returns:
            The box, float64 (4,) xyxy clipped to the frame (it may be empty), and the score in
            [0, 1].

        Raises:
            UserError: before ``init``, or if the frame is no RGB image.
        """
        if self._target is None:
            raise UserError("Nothing is being tracked; call init(frame, box) first.")
        boxes, scores = self.step([self._target], [frame])
        return boxes[0], float(scores[0])

    def start(self, frames: Sequence[np.ndarray], boxes: Sequence[Sequence[float]]) -> list[Target]:
        """Make one target per first frame and box; see :meth:`init`."""
        variant = self.variant
        targets = []
        for frame, given in zip(frames, boxes, strict=True):
            box = check_box(given, check_frame(frame))
            fill_rgb = np.array(mean_rgb(frame), dtype=np.float32)
            nominal = crop_params(box, variant.template_area_factor, variant.template_size)
            crop_HWC, adjusted = resample(frame, nominal, variant.template_size, fill_rgb)
            mask_hw = foreground_mask(
                adjusted.apply(box), variant.template_size, variant.template_grid
            )
            targets.append(
                Target(
                    template_CHW=self._network_input([crop_HWC])[0],
                    mask_hw=torch.from_numpy(mask_hw).to(self.device),
                    fill_rgb=fill_rgb,
                    box=box,
                )
            )
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return targets

    def step(
        self, targets: Sequence[Target], frames: Sequence[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Advance each target by its next frame, all in one forward pass.

        The results are on the host, so the work of the device is done on return.

        Args:
            targets: changed in place.
            frames: one per target, uint8 RGB of any size.

        Returns:
            Boxes float64 (B, 4), xyxy clipped to their frames, and scores float64 (B,).

        Raises:
            UserError: if a frame is no RGB image, or the network's output is not finite.
        """
        sizes = [check_frame(frame) for frame in frames]
        crops = self._search_crops(targets, frames)
        peak = find_peak(
            *self._forward(
                torch.stack([target.template_CHW for target in targets]),
                self._network_input([crop_HWC for crop_HWC, _ in crops]),
                torch.stack([target.mask_hw for target in targets]),
            ),
            self._window_HW,
            self.tracking.window_penalty,
        )
        result_B5 = torch.cat([peak.box_B4, peak.confidence_B.unsqueeze(1)], dim=1).cpu()
        if not torch.isfinite(result_B5).all():
            raise UserError(
                f"The network's output is not finite in {self._precision()}; track with bf16 or "
                "fp32, or check the weights."
            )
        boxes = np.empty((len(targets), 4))
        for row, (target, (_, adjusted), size) in enumerate(
            zip(targets, crops, sizes, strict=True)
        ):
            x1, y1, x2, y2, _ = result_B5[row].tolist()
            found = box_in_frame((x1, y1, x2, y2), self.variant.search_size, adjusted)
            submitted = clip_box(found, *size)
            target.box = next_box(submitted, target.box, size)
            boxes[row] = submitted
        return boxes, result_B5[:, 4].double().numpy()

    def _search_crop(self, target: Target, frame: np.ndarray) -> tuple[np.ndarray, CropParams]:
        variant, tracking = self.variant, self.tracking
        box = enlarge_to_minimum(target.box, tracking.min_object_size)
        factor = tracking.search_area_factor or variant.search_area_factor
        nominal = crop_params(box, factor, variant.search_size)
        return resample(frame, nominal, variant.search_size, target.fill_rgb)

    def _search_crops(
        self, targets: Sequence[Target], frames: Sequence[np.ndarray]
    ) -> list[tuple[np.ndarray, CropParams]]:
        """Crop for a batch, on several threads where that can pay off."""
        num_threads = min(os.cpu_count() or 1, 8)
        if len(targets) < 2 or num_threads < 2:
            return list(map(self._search_crop, targets, frames))
        if self._pool is None:
            self._pool = ThreadPoolExecutor(num_threads, "crop")
        return list(self._pool.map(self._search_crop, targets, frames))

    def _network_input(self, crops: Sequence[np.ndarray]) -> Tensor:
        """Stack float32 crops (H, W, C), 0 to 255, to a normalised (B, C, H, W) batch."""
        image_BHWC = torch.from_numpy(np.stack(crops)).to(self.device)
        image_BCHW = image_BHWC.permute(0, 3, 1, 2).contiguous() / 255
        return normalize_(image_BCHW).to(self.dtype)

    @torch.inference_mode()
    def _forward(
        self, template_BCHW: Tensor, search_BCHW: Tensor, mask_Bhw: Tensor
    ) -> tuple[Tensor, Tensor]:
        with contextlib.ExitStack() as stack:
            if self._autocast:
                stack.enter_context(torch.autocast("cuda", torch.float16))
            elif self.device.type == "cuda":  # float32 means float32 in the patch embedding, too
                stack.enter_context(torch.backends.cudnn.flags(enabled=True, allow_tf32=False))
            outputs = self.model(template_BCHW, search_BCHW, mask_Bhw)
        return outputs["score_map"], outputs["boxes"]

    def _precision(self) -> str:
        return "fp16 autocast" if self._autocast else str(self.dtype).removeprefix("torch.")


def check_frame(frame: np.ndarray) -> tuple[int, int]:
    """Return (width, height) of a frame.

    Raises:
        UserError: if it is not a uint8 RGB image (H, W, 3) with at least one pixel.
    """
    if not isinstance(frame, np.ndarray):
        raise UserError(
            f"The frame is a {type(frame).__name__}; give a uint8 RGB array (height, width, 3)."
        )
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or frame.size == 0:
        raise UserError(
            f"The frame has shape {frame.shape} and type {frame.dtype}; give a uint8 RGB array "
            "(height, width, 3)."
        )
    return frame.shape[1], frame.shape[0]


def check_box(box: Sequence[float], frame_wh: tuple[int, int]) -> Box:
    """Return the box as floats.

    Raises:
        UserError: if it is not xyxy with positive sides that shares area with the frame.
    """
    values = [float(value) for value in box]
    if len(values) != 4 or not all(math.isfinite(value) for value in values):
        raise UserError(f"The box is {values}; give four finite numbers x1, y1, x2, y2.")
    x1, y1, x2, y2 = values
    if not (x1 < x2 and y1 < y2):
        raise UserError(f"The box {values} is empty; give x1 < x2 and y1 < y2, in pixels.")
    width, height = frame_wh
    if not intersects((x1, y1, x2, y2), width, height):
        raise UserError(
            f"The box {values} lies outside of the {width}x{height} frame; give a box inside."
        )
    return (x1, y1, x2, y2)


def resolve_device(device: torch.device | str | None) -> torch.device:
    """Return a device of this machine; none means the GPU where there is one.

    Raises:
        UserError: if it is not there.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    resolved = torch.device(device)
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"The device is {device}, but this machine has none; give cpu, or nothing.")
    return resolved
