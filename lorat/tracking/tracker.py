"""The tracker: one target in a video, or many videos in one batch.

A :class:`Target` holds all that belongs to one video, so a :class:`Tracker` serves any number of
them: ``start`` makes targets, ``step`` advances some of them by one frame each.  ``init`` and
``update`` are the same for a single video.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import is_

import numpy as np
import torch
from torch import Tensor, nn

from lorat.config.tracking import TrackingConfig
from lorat.errors import UserError
from lorat.image.boxes import Box, clip_box, enlarge_to_minimum, intersects, rasterize
from lorat.image.codec import mean_rgb
from lorat.image.crops import CropParams, crop_params, foreground_mask, resample
from lorat.model.cuda_graphs import CudaGraphs
from lorat.model.network import LoRAT
from lorat.model.normalisation import normalize_
from lorat.tracking.capture import Capture
from lorat.tracking.postprocess import box_in_frame, find_peak, hann_window, next_box
from lorat.tracking.search_crops import DeviceCrops, HostCrops, SearchCrops

STAGES = ("crop", "copy", "network", "read back")
"""Parts of a step: cutting the frames, the rest of the way to the device, all that it computes, and
the results."""
MIN_SIDE_PX = 0.01
"""Shortest side of a box to begin with; far smaller ones touch no token of a template."""


@dataclass(kw_only=True)
class Target:
    """One tracked object: its template and where it was seen last.

    Its tensors may be replaced, but are not written to.
    """

    template_CHW: Tensor
    mask_hw: Tensor
    fill_rgb: np.ndarray
    """Mean colour of the first frame; fills search crops outside of the frame."""
    box: Box
    """Where to search next, in frame pixels."""


@dataclass(frozen=True, kw_only=True)
class FirstView:
    """What a target's template is made from: the first frame, or the part of it that matters."""

    image_HWC: np.ndarray
    """uint8 RGB."""
    window: Box | None
    """The part of the frame that the image shows, in its pixels; none means the whole frame."""
    fill_rgb: np.ndarray
    """Mean colour of the whole frame."""
    box: Box
    """The object, in pixels of the frame."""

    @classmethod
    def of(cls, frame: np.ndarray, box: Sequence[float]) -> FirstView:
        """Return the view of a whole frame.

        Raises:
            UserError: if the frame is no RGB image or the box is empty or outside of it.
        """
        checked = check_box(box, check_frame(frame))
        fill_rgb = np.array(mean_rgb(frame), dtype=np.float32)
        return cls(image_HWC=frame, window=None, fill_rgb=fill_rgb, box=checked)

    def reduced(self, area_factor: float) -> FirstView:
        """Keep a copy of what a template of up to this area factor shows."""
        height, width = self.image_HWC.shape[:2]
        reach = crop_params(self.box, area_factor, 1).inverse().apply((0.0, 0.0, 1.0, 1.0))
        left, top, right, bottom = rasterize(reach)
        # The crop's borders are widened to pixels.  One pixel stays of a frame out of its reach.
        left, top = min(max(left - 2, 0), width - 1), min(max(top - 2, 0), height - 1)
        right = max(min(right + 2, width), left + 1)
        bottom = max(min(bottom + 2, height), top + 1)
        return dataclasses.replace(
            self,
            image_HWC=self.image_HWC[top:bottom, left:right].copy(),
            window=(float(left), float(top), float(right), float(bottom)),
        )


class Tracker:
    """Track objects given by a box in the first frame of their videos.

    On CUDA the frames' regions are resampled on the device, and all that it computes in a step is
    captured as a CUDA graph once per number of targets.

    Args:
        model: in training or deployable form; it is left as it is.
        device: by default CUDA where there is some.
        dtype: of the weights.  By default float32, on CUDA under float16 autocast as published.
        capture: false starts the kernels of each step one by one, also on CUDA.
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
        capture: bool = True,
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
        if self._autocast:
            round_products(self.model, torch.float16)
        grid = self.variant.search_grid
        self._window_HW = hann_window(grid, grid, self.device)
        self._target: Target | None = None
        self.after_stage: Callable[[str], None] = _go_on
        """Called at the end of each of :data:`STAGES`, such as by what measures them."""
        on_gpu = self.device.type == "cuda"
        size = self.variant.search_size
        self._crops: SearchCrops = (DeviceCrops if on_gpu else HostCrops)(size, self.device)
        recorder = CudaGraphs(self.device) if on_gpu and capture else None
        self._capture = Capture(self.model, recorder)
        self._stacked: tuple[list[Tensor], tuple[Tensor, Tensor]] | None = None
        # Threads that track at the same time share the buffers of a GPU.
        self._turn: contextlib.AbstractContextManager = (
            threading.Lock() if on_gpu else contextlib.nullcontext()
        )

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

    @property
    def num_captured(self) -> int:
        """Numbers of targets for which a step is a CUDA graph."""
        return self._capture.num_recordings

    def start(self, frames: Sequence[np.ndarray], boxes: Sequence[Sequence[float]]) -> list[Target]:
        """Make one target per first frame and box; see :meth:`init`."""
        return self.start_from(
            [FirstView.of(frame, box) for frame, box in zip(frames, boxes, strict=True)]
        )

    def start_from(self, views: Sequence[FirstView]) -> list[Target]:
        """Make one target per kept part of a first frame, as :meth:`start` does of the frame."""
        variant = self.variant
        targets = []
        for view in views:
            nominal = crop_params(view.box, variant.template_area_factor, variant.template_size)
            crop_HWC, adjusted = resample(
                view.image_HWC, nominal, variant.template_size, view.fill_rgb, window=view.window
            )
            mask_hw = foreground_mask(
                adjusted.apply(view.box), variant.template_size, variant.template_grid
            )
            targets.append(
                Target(
                    template_CHW=self._network_input(
                        torch.from_numpy(crop_HWC[None]).to(self.device)
                    )[0],
                    mask_hw=torch.from_numpy(mask_hw).to(self.device),
                    fill_rgb=view.fill_rgb,
                    box=view.box,
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
        with self._turn:
            adjusted, packed = self._crops.cut(
                frames,
                [self._search_params(target) for target in targets],
                [target.fill_rgb for target in targets],
            )
            self.after_stage("crop")
            sent = self._crops.send(packed)
            self.after_stage("copy")
            answer_B5 = self._capture(
                self._compute,
                *self._stack(targets),
                fixed=sent,
                constants=(self.tracking.window_penalty,),
            )
            self.after_stage("network")
            result_B5 = answer_B5.to("cpu", copy=True).numpy()  # the next step may change it
        if not np.isfinite(result_B5).all():
            raise UserError(
                f"The network's output is not finite in {self._precision()}; track with bf16 or "
                "fp32, or check the weights."
            )
        boxes = []
        for target, (x1, y1, x2, y2, _), params, size in zip(
            targets, result_B5.tolist(), adjusted, sizes, strict=True
        ):
            found = box_in_frame((x1, y1, x2, y2), self.variant.search_size, params)
            submitted = clip_box(found, *size)
            target.box = next_box(submitted, target.box, size)
            boxes.append(submitted)
        scores = result_B5[:, 4].astype(np.float64)
        self.after_stage("read back")
        return np.array(boxes, dtype=np.float64), scores

    def _stack(self, targets: Sequence[Target]) -> tuple[Tensor, Tensor]:
        """Return all templates and masks, as tensors of the step before if they are the same."""
        single = [tensor for target in targets for tensor in (target.template_CHW, target.mask_hw)]
        kept = self._stacked  # another thread may replace it
        if kept is None or len(kept[0]) != len(single) or not all(map(is_, kept[0], single)):
            kept = single, (torch.stack(single[::2]), torch.stack(single[1::2]))
            self._stacked = kept
        return kept[1]

    def _search_params(self, target: Target) -> CropParams:
        variant, tracking = self.variant, self.tracking
        box = enlarge_to_minimum(target.box, tracking.min_object_size)
        factor = tracking.search_area_factor or variant.search_area_factor
        return crop_params(box, factor, variant.search_size)

    def _network_input(self, image_BHWC: Tensor) -> Tensor:
        """Normalise float32 crops, 0 to 255, to a (B, C, H, W) batch."""
        image_BCHW = image_BHWC.permute(0, 3, 1, 2).contiguous() / 255
        return normalize_(image_BCHW).to(self.dtype)

    @torch.inference_mode()
    def _compute(
        self, template_BCHW: Tensor, mask_Bhw: Tensor, sent: Tensor, penalty: float
    ) -> Tensor:
        """Do all of a step that is the device's: box, normalised xyxy, and score, (B, 5).

        It may be replayed, so numbers of the host that may change must be arguments.
        """
        search_BCHW = self._network_input(self._crops.crops(sent, len(template_BCHW)))
        outputs = self._forward(template_BCHW, search_BCHW, mask_Bhw)
        peak = find_peak(*outputs, self._window_HW, penalty)
        return torch.cat([peak.box_B4, peak.confidence_B.unsqueeze(1)], dim=1)

    def _forward(
        self, template_BCHW: Tensor, search_BCHW: Tensor, mask_Bhw: Tensor
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast("cuda", torch.float16, enabled=self._autocast):
            outputs = self.model(template_BCHW, search_BCHW, mask_Bhw)
        return outputs["score_map"], outputs["boxes"]

    def _precision(self) -> str:
        return "fp16 autocast" if self._autocast else str(self.dtype).removeprefix("torch.")


def _go_on(stage: str) -> None:
    """Do nothing after a stage."""


def round_products(model: nn.Module, dtype: torch.dtype) -> None:
    """Store the weights of matrix products and convolutions as autocast would round them.

    Autocast then gives the same bits without rounding all of them again in every pass.

    Args:
        model: changed in place.
        dtype: autocast's.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(dtype)


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
        UserError: if it is not xyxy with sides of :data:`MIN_SIDE_PX` that shares area with the
            frame.
    """
    values = [float(value) for value in box]
    if len(values) != 4 or not all(math.isfinite(value) for value in values):
        raise UserError(f"The box is {values}; give four finite numbers x1, y1, x2, y2.")
    x1, y1, x2, y2 = values
    if not (x1 < x2 and y1 < y2):
        raise UserError(f"The box {values} is empty; give x1 < x2 and y1 < y2, in pixels.")
    if min(x2 - x1, y2 - y1) < MIN_SIDE_PX:
        raise UserError(
            f"The box {values} has a side of less than {MIN_SIDE_PX} pixels; give a larger one."
        )
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
