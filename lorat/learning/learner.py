"""Model, loss and optimiser of one worker, and one optimiser step over the global batch.

B batch, C 3 channels, H W crop rows and columns, h w template grid.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lorat import checkpoint
from lorat.config.training import TrainConfig
from lorat.errors import UserError
from lorat.learning.augment import augment, foreground_mask
from lorat.learning.capture import CapturedStep
from lorat.learning.clock import StepClock
from lorat.learning.criterion import Criterion, positive_mask
from lorat.learning.optimisation import build_optimizer, scheduled_lr, set_learning_rate
from lorat.learning.step import Inputs, Readback, StepResult
from lorat.model.cuda_graphs import CudaGraphs
from lorat.model.network import LoRAT, build_model

log = logging.getLogger(__name__)

BUCKET_MB = 100
"""DDP's gradient bucket, as in the published training."""


@dataclass(frozen=True, kw_only=True)
class World:
    """The place of this worker among all."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


class Learner:
    """What learns in one worker.

    The step of a global batch is the same for any number of workers, with one exception: which
    branches drop path and LoRA's dropout leave out is drawn by each worker for its own pairs,
    from the seed, the step and the worker's rank.  So with drop path (by default L and g) it is
    repeated by resuming on as many workers, and equal in law, not in value, on others.  Above a
    rate of 0.1 even the number of left out pairs is that of a worker's part (DINOv2's rule).

    Args:
        config: resolved.
        world: this worker's place; DDP is used where there are several.
        model: instead of the one that ``config`` describes.
        resume: checkpoint folder with a training state to go on from.
        start_weights: checkpoint folder or file to start from, warm; frozen weights that it lacks
            come from the configuration's backbone, if that is a file or ``hub``.

    Raises:
        UserError: if the precision does not fit the device, or weights do not fit the model.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        world: World | None = None,
        model: LoRAT | None = None,
        resume: Path | str | None = None,
        start_weights: Path | str | None = None,
    ) -> None:
        self.config = config
        self.world = world or World()
        self.device = self.world.device
        self.clock = StepClock(self.device)
        self.amp_dtype = resolve_precision(config, self.device)
        if resume is not None and model is None:
            model = checkpoint.load(resume)
        elif model is None:
            model = build_model(config)
            if start_weights is not None:
                # Where a checkpoint's own frozen weights are known, auto means those.
                given = config.backbone if config.backbone not in ("auto", "none") else None
                checkpoint.warm_start(model, start_weights, variant=config.variant, backbone=given)
        self.model = model.to(self.device).train()
        self.criterion = Criterion()
        self.optimizer = build_optimizer(self.model, config)
        self.parameters = self.model.trainable_parameters()
        scaled = self.amp_dtype is torch.float16
        self.scaler = torch.amp.GradScaler("cuda") if scaled else None
        self.step = 0
        """Optimiser steps taken."""
        self._num_skipped = 0
        self._unread: deque[StepResult] = deque()
        """Last steps, of which the host may not know yet whether they were left out."""
        if resume is not None:
            state = checkpoint.load_training_state(
                resume, self.model, self.optimizer, scaler=self.scaler
            )
            self.step = state.step
            self._num_skipped = int(state.extra.get("num_skipped", 0))
        self.random = bool(config.drop_path) or config.lora.dropout > 0
        self.compiled = config.compile == "on" or (
            config.compile == "auto" and self.device.type == "cuda"
        )
        if self.compiled:
            self.model.compile(dynamic=False)
        self._captured: CapturedStep | None = None
        """The step as a graph, where it can be one."""
        if self._has_fixed_step():
            self._captured = CapturedStep(self.optimizer, CudaGraphs(self.device))
        self._proven = not self.compiled
        """Whether a pass has gone through with whatever torch.compile made."""
        self._augment_compiled = self.compiled and self.device.type == "cuda"
        """Whether the augmentation is compiled too, which gains nothing on a CPU."""
        self._forward: nn.Module = self.model
        if self.world.size > 1:
            self._forward = DistributedDataParallel(
                self.model,
                device_ids=[self.device.index] if self.device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                static_graph=config.micro_batch is None,
                bucket_cap_mb=BUCKET_MB,
            )

    def _has_fixed_step(self) -> bool:
        """Say whether every step starts the same kernels on CUDA, which a graph can hold.

        Those of several workers wait for each other, and with ``compile`` off nothing is hidden.
        """
        return (
            self.compiled
            and self.device.type == "cuda"
            and self.world.size == 1
            and self.config.micro_batch is None
        )

    @property
    def num_skipped(self) -> int:
        """Steps left out because loss or gradient was not finite; waits for the last step."""
        self._count_skipped(0)
        return self._num_skipped

    def _count_skipped(self, unread: int) -> None:
        while len(self._unread) > unread:
            self._num_skipped += not self._unread.popleft().finite

    def to_device(self, batch: dict[str, np.ndarray]) -> dict[str, Tensor]:
        """Copy what the device needs of a batch; through pinned memory on CUDA."""
        tensors = {}
        for name in ("template", "search", "template_box", "search_box", "augment"):
            host = torch.empty(
                batch[name].shape,
                dtype=torch.uint8 if batch[name].dtype == np.uint8 else torch.float32,
                pin_memory=self.device.type == "cuda",
            )
            np.copyto(host.numpy(), batch[name])
            tensors[name] = host.to(self.device, non_blocking=True)
        return tensors

    def train_step(self, batch: dict[str, Tensor]) -> StepResult:
        """Augment this worker's part of a global batch and take one optimiser step on it."""
        return self.learn(self.prepare(batch))

    def prepare(self, batch: dict[str, Tensor]) -> Inputs:
        """Augment what :meth:`to_device` gives, on any stream and in any thread."""
        variant = self.model.variant
        with self.clock.device_part("augment"), torch.no_grad():
            template, search, template_box, search_box = self._augment(batch)
            mask = foreground_mask(template_box, variant)
            return Inputs(template, search, mask, search_box / variant.search_size)

    def _augment(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self._augment_compiled:
            try:
                return augment(batch, compiled=True)
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:
                _warn_uncompiled("the augmentation", error)
                self._augment_compiled = False
        return augment(batch)

    def learn(self, inputs: Inputs) -> StepResult:
        """Take one optimiser step on this worker's part of a global batch."""
        if self.random:
            torch.manual_seed(step_seed(self.config.seed, self.step, self.world.rank))
        return self.step_on(*inputs)

    def step_on(
        self, template_BCHW: Tensor, search_BCHW: Tensor, mask_Bhw: Tensor, box_norm_B4: Tensor
    ) -> StepResult:
        """Take one optimiser step on this worker's part of a global batch.

        Gradients are those of the whole global batch, however many workers and passes share it:
        the loss is a sum over pairs divided by the positives of all of them.

        Args:
            template_BCHW, search_BCHW, mask_Bhw: as the model takes them.
            box_norm_B4: targets, xyxy as fractions of the search crop.
        """
        inputs = Inputs(template_BCHW, search_BCHW, mask_Bhw, box_norm_B4)
        set_learning_rate(self.optimizer, self.lr)
        # A graph holds what the compiler made, so that has to have worked.
        if self._captured is not None and self._proven and self.compiled and self._ready(inputs):
            with self.clock.device_part("replay"):
                values = self._captured.replay(*inputs, lr=self.lr)
        else:
            values = self._step(*inputs)
        result = StepResult(
            step=self.step,
            losses=values[:3],
            grad_norm=values[3],
            num_pairs=len(search_BCHW),
            verdict=Readback(values[4:]),
        )
        self.step += 1
        self._unread.append(result)
        # Of the step before, whose answer is there or soon is, while the device does this one.
        self._count_skipped(1)
        return result

    def _ready(self, inputs: Inputs) -> bool:
        """Say whether the step is a replay, and put in order what a failed recording left."""
        assert self._captured is not None
        with self.clock.paused():
            ready = self._captured.ready(self._step, *inputs)
        if self._captured.failed:
            self._captured = None
            self.optimizer.zero_grad(set_to_none=True)
            if self.scaler is not None:  # it has been told half of a step
                state = self.scaler.state_dict()
                self.scaler = torch.amp.GradScaler(self.device.type)
                self.scaler.load_state_dict(state)
        return ready

    def _step(
        self, template_BCHW: Tensor, search_BCHW: Tensor, mask_Bhw: Tensor, box_norm_B4: Tensor
    ) -> Tensor:
        """Do what the device does in a step, and return its 3 losses, gradient norm and verdict."""
        with self.clock.device_part("augment"), torch.no_grad():
            positive_BHW = positive_mask(box_norm_B4, 1.0, self.model.variant.search_grid)
            num_positive = positive_BHW.sum(dtype=torch.float32)
            if self.world.size > 1:
                dist.all_reduce(num_positive)
                num_positive /= self.world.size
        num_pairs = len(search_BCHW)
        passes = math.ceil(num_pairs / (self.config.micro_batch or num_pairs))
        totals = torch.zeros(3, device=self.device)
        given = (template_BCHW, search_BCHW, mask_Bhw, box_norm_B4, positive_BHW)
        parts = zip(*(t.tensor_split(passes) for t in given), strict=True)
        for number, part in enumerate(parts):
            with self._no_sync(number == passes - 1):
                totals += self._pass(part, num_positive)
        with self.clock.device_part("optimiser"):
            grad_norm, verdict = self._update(totals[0])
        return torch.cat([totals, grad_norm.view(1), verdict])

    def _no_sync(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        if last or not isinstance(self._forward, DistributedDataParallel):
            return contextlib.nullcontext()
        return self._forward.no_sync()

    def _pass(self, part: tuple[Tensor, ...], num_positive: Tensor) -> Tensor:
        """Go forward and backward; return loss, loss_cls, loss_reg."""
        if self._proven:
            return self._forward_backward(part, num_positive)
        try:
            losses = self._forward_backward(part, num_positive)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            _warn_uncompiled("the network", error)
            self.compiled = False
            self.model.uncompile()
            self.optimizer.zero_grad(set_to_none=True)
            losses = self._forward_backward(part, num_positive)
        self._proven = True
        return losses

    def _forward_backward(self, part: tuple[Tensor, ...], num_positive: Tensor) -> Tensor:
        z, x, mask, target, positive = part
        with self.clock.device_part("forward"):
            losses = self.criterion(
                self._outputs(z, x, mask), target, num_positive=num_positive, positive_BHW=positive
            )
        with self.clock.device_part("backward"):
            loss = losses["loss"]
            (self.scaler.scale(loss) if self.scaler else loss).backward()
        return torch.stack([losses[name].detach() for name in ("loss", "loss_cls", "loss_reg")])

    def _outputs(self, z: Tensor, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
        if self.amp_dtype is None:
            return self._forward(z, x, mask)
        with torch.autocast(self.device.type, self.amp_dtype):
            return self._forward(z, x, mask)

    def _update(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Clip and step; leave the weights alone if loss or gradient is not finite.

        That is decided on the device, so that nothing waits for it.

        Returns:
            Gradient norm and verdict, as in :class:`StepResult`.
        """
        scale = torch.zeros((), device=self.device)
        if self.scaler is not None:
            scale = self.scaler.scale(torch.ones((), device=self.device))
            self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        bad_loss = (~torch.isfinite(loss)).float()
        if self.world.size > 1:
            dist.all_reduce(bad_loss, dist.ReduceOp.MAX)
        bad_grad = (~torch.isfinite(norm)).float()
        self.optimizer.found_inf = torch.maximum(bad_loss, bad_grad)  # type: ignore[attr-defined]
        self.optimizer.step()
        if self.scaler is not None:
            # The scaler's own step would look at the gradients only.
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.detach(), torch.stack([bad_loss, bad_grad, scale])

    def save(self, folder: Path | str, **extra: Any) -> None:
        """Write weights and everything that resuming needs."""
        checkpoint.save(self.model, self.config, folder)
        checkpoint.save_training_state(
            folder,
            self.model,
            self.optimizer,
            step=self.step,
            scaler=self.scaler,
            extra={"num_skipped": self.num_skipped, **extra},
        )

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return scheduled_lr(self.step, self.config)


def _warn_uncompiled(what: str, error: Exception) -> None:
    lines = str(error).strip().splitlines()
    log.warning(
        "torch.compile failed for %s (%s: %s); training goes on without it",
        what,
        type(error).__name__,
        lines[0] if lines else "",
    )


def resolve_precision(config: TrainConfig, device: torch.device) -> torch.dtype | None:
    """Return the autocast type, none for float32.

    Raises:
        UserError: for fp16 on a CPU, which has no fast half precision.
    """
    name = config.precision
    if name == "auto":
        name = "fp16" if device.type == "cuda" else "fp32"
    if name == "fp16" and device.type != "cuda":
        raise UserError("precision fp16 needs a GPU; give fp32, bf16 or auto.")
    return {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}[name]


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed a worker's drop path and dropout from the step, so that resuming repeats them."""
    entropy = np.random.SeedSequence([seed, 7, step, rank]).generate_state(1, np.uint64)
    return int(entropy[0] >> 1)
