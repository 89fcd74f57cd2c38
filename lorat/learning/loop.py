"""What one training worker does, whatever started it and wherever its batches come from."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import GeneratorType
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist

from lorat.config.training import TrainConfig
from lorat.data.pairs.batches import Batch, BatchSource
from lorat.errors import UserError, reason
from lorat.files.storage import Location
from lorat.learning.clock import PARTS, memory_bytes, peak_flops, summarise
from lorat.learning.learner import Learner, World
from lorat.learning.step import Inputs, StepResult
from lorat.model.complexity import describe

log = logging.getLogger(__name__)

Prepared = tuple[Batch, Callable[[], Inputs]]

FEWEST_IMAGES = 500
"""Images that are read before their damaged share can stop the training, but at its end."""
MOST_DUMPS = 3
"""Steps that are dumped in one life of a worker; each holds the weights."""
CHECKED_LATER = {"cuda": 1}
"""Steps that are begun, by type of device, before one is asked whether it was left out; 0 where a
device is not named.  To ask at once would leave a device without work."""


@dataclass(kw_only=True)
class Hooks:
    """What happens around the steps.  Every worker calls every hook."""

    log_every: int = 20
    """Steps in a reporting interval."""
    on_interval: Callable[[int, dict[str, float]], bool | None] | None = None
    """Called with (steps taken, metrics of the interval over all workers); true ends the loop,
    and must be the same on every worker."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; none means only at the end."""
    on_checkpoint: Callable[[Learner, dict[str, float]], None] | None = None
    """Called when a checkpoint is due, at the end too, with the last interval's metrics."""
    on_step: Callable[[int], bool | None] | None = None
    """Called after every step with the steps taken; true asks for a checkpoint now."""
    dumps: Location | None = None
    """Where batches that give a loss or gradient that is not finite are written."""


@dataclass
class _Interval:
    """Sums since the last report."""

    steps: int = 0
    pairs: int = 0
    skipped: int = 0
    losses: torch.Tensor = field(default_factory=lambda: torch.zeros(3))
    grad_norm: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    num_norms: int = 0
    """Steps whose gradient norm is finite."""
    damaged: int = 0
    images: int = 0
    bytes_read: int = 0


def run(
    config: TrainConfig,
    source: BatchSource,
    *,
    world: World | None = None,
    hooks: Hooks | None = None,
    learner: Learner | None = None,
    end_step: int | None = None,
) -> Learner:
    """Train until ``end_step`` or until a hook ends it.

    Args:
        config: resolved.
        source: this worker's batches.
        world: this worker's place.
        hooks: reports, checkpoints, stopping.
        learner: to go on with; none means a new one from ``config``.
        end_step: optimiser steps at the end; none means ``config.total_steps``.

    Raises:
        UserError: if too many images are damaged, or a loss is not finite and the configuration
            says to stop, or too many steps in a row are left out.
    """
    world = world or World()
    hooks = hooks or Hooks()
    learner = learner or Learner(config, world=world)
    end_step = config.total_steps if end_step is None else end_step
    clock = learner.clock
    flops = float(describe(config.model_variant, config).train_flops)
    peak, _ = peak_flops(world.device)
    interval = _Interval()
    damaged_total = images_total = skipped_in_a_row = 0
    unchecked: deque[tuple[Batch, StepResult]] = deque()
    later = CHECKED_LATER.get(world.device.type, 0)
    metrics: dict[str, float] = {}
    saved_step = learner.step if learner.step else -1
    batches = _on_device(iter(source.batches(learner.step)), learner)
    stop = False
    clock.reset()
    while learner.step < end_step and not stop:
        with clock.part("data"):
            batch, inputs = next(batches)
        _count(interval, batch)
        unchecked.append((batch, learner.learn(inputs())))
        save_now = bool(hooks.on_step and hooks.on_step(learner.step))
        due = learner.step % hooks.log_every == 0 or learner.step == end_step
        every = hooks.checkpoint_every
        save_due = every is not None and learner.step % every == 0
        # The same number on every worker: a step that is not finite is dealt with together.
        while len(unchecked) > (0 if due or save_due else later):
            batch, result = unchecked.popleft()
            _add(interval, result, world.device)
            skipped_in_a_row = 0 if result.finite else skipped_in_a_row + 1
            if not result.finite:
                _handle_nonfinite(learner, batch, result, hooks, world)
                _check_skipped(config, skipped_in_a_row)
        if due:
            metrics = _report(interval, learner, world, flops, peak)
            damaged_total += int(metrics.pop("_damaged"))
            images_total += int(metrics.pop("_images"))
            metrics["system/damaged_share"] = damaged_total / max(images_total, 1)
            enough = images_total >= FEWEST_IMAGES or learner.step == end_step
            if enough:
                _check_damage(config, damaged_total, images_total)
            interval = _Interval()
            stop = bool(hooks.on_interval and hooks.on_interval(learner.step, metrics))
        at_end = learner.step == end_step or stop
        wanted = at_end or save_now or save_due
        if wanted and hooks.on_checkpoint and saved_step != learner.step:
            with clock.part("checkpoint"):
                hooks.on_checkpoint(learner, metrics)
            saved_step = learner.step
    batches.close()
    return learner


def _on_device(batches: Iterator[Batch], learner: Learner) -> Generator[Prepared, None, None]:
    """Yield batches with a call that gives them on the device, augmented.

    On CUDA a thread copies and augments the next batch, through pinned memory and on a stream of
    its own, while the current one is computed; the call then only waits for that.
    """
    clock = learner.clock

    def at_once(batch: Batch) -> Inputs:
        with clock.part("copy"):
            tensors = learner.to_device(batch)
        return learner.prepare(tensors)

    if learner.device.type != "cuda":
        try:
            for batch in batches:
                yield batch, functools.partial(at_once, batch)
        finally:
            _close(batches)
        return
    stream = torch.cuda.Stream(learner.device)

    def ahead_of_time(batch: Batch) -> tuple[Batch, Inputs, torch.cuda.Event]:
        with torch.cuda.stream(stream):
            inputs = learner.prepare(learner.to_device(batch))
            done = torch.cuda.Event()
            done.record(stream)
        return batch, inputs, done

    def wait(inputs: Inputs, done: torch.cuda.Event) -> Inputs:
        with clock.part("copy"):
            current = torch.cuda.current_stream(learner.device)
            current.wait_event(done)
            for tensor in inputs:
                tensor.record_stream(current)
        return inputs

    try:
        with ThreadPoolExecutor(1, "to-device") as pool:
            ahead = pool.submit(lambda: ahead_of_time(next(batches)))
            while True:
                try:
                    batch, inputs, done = ahead.result()
                except StopIteration:
                    return
                ahead = pool.submit(lambda: ahead_of_time(next(batches)))
                yield batch, functools.partial(wait, inputs, done)
    finally:
        _close(batches)


def _close(batches: Iterator[Batch]) -> None:
    if isinstance(batches, GeneratorType):
        batches.close()


def _count(interval: _Interval, batch: dict[str, np.ndarray]) -> None:
    interval.damaged += int(batch["damaged"].sum())
    interval.images += 2 * len(batch["index"]) + int(batch["damaged"].sum())
    interval.bytes_read += int(batch["bytes_read"].sum())


def _add(interval: _Interval, result: StepResult, device: torch.device) -> None:
    interval.steps += 1
    interval.pairs += result.num_pairs
    interval.skipped += not result.finite
    if result.finite:
        interval.losses = interval.losses.to(device) + result.losses
        if result.grad_finite:
            interval.grad_norm = interval.grad_norm.to(device) + result.grad_norm
            interval.num_norms += 1


def _report(
    interval: _Interval, learner: Learner, world: World, flops: float, peak: float
) -> dict[str, float]:
    """Sum the interval over the workers and turn it into metrics; a collective call."""
    wall_s, parts_s = learner.clock.read()
    # One tensor and one call for everything: each call makes all workers wait for the slowest.
    # Doubles, since bytes of an interval pass what a float counts exactly.
    memory = memory_bytes(world.device)
    sums = torch.tensor(
        [
            float(interval.pairs),
            float(interval.damaged),
            float(interval.images),
            float(interval.bytes_read),
            wall_s,
            *(parts_s[name] for name in PARTS),
            *memory.values(),
        ],
        dtype=torch.float64,
    )
    values = torch.cat([sums.to(world.device), interval.losses.to(world.device).double()])
    if world.size > 1:
        dist.all_reduce(values)
    numbers = values.tolist()
    # Pairs, images and bytes are counts of all workers; times and losses are means over them.  Each
    # divides by the mean number of positives of all, so the mean is that of the global batch.
    pairs, damaged, images, num_bytes, wall_s = numbers[:5]
    parts = {k: v / world.size for k, v in zip(PARTS, numbers[5:], strict=False)}
    held = numbers[5 + len(PARTS) : 5 + len(PARTS) + len(memory)]
    counted = interval.steps - interval.skipped
    # Of an interval without a step that counts there is no mean, and 0 would look like success.
    loss, loss_cls, loss_reg = (
        v / (counted * world.size) if counted else math.nan for v in numbers[-3:]
    )
    metrics = {
        "train/loss": loss,
        "train/loss_cls": loss_cls,
        "train/loss_reg": loss_reg,
        "grad_norm": float(interval.grad_norm) / (interval.num_norms or math.nan),
        "lr": learner.optimizer.param_groups[0]["lr"],
        "skipped_steps": float(learner.num_skipped),
        "epoch": learner.step / learner.config.steps_per_epoch,
        "system/bytes_per_pair": num_bytes / max(pairs, 1),
        "_damaged": damaged,
        "_images": images,
    }
    if learner.scaler is not None:
        metrics["loss_scale"] = float(learner.scaler.get_scale())
    metrics |= summarise(
        wall_s=wall_s / world.size,
        parts_s=parts,
        num_steps=interval.steps,
        num_pairs=int(pairs),
        num_workers=world.size,
        flops_per_pair=flops,
        peak=peak,
    )
    metrics |= {
        f"system/memory_gb/{k}": v / world.size / 2**30 for k, v in zip(memory, held, strict=True)
    }
    return metrics


def _check_damage(config: TrainConfig, damaged: int, images: int) -> None:
    if damaged > config.max_damaged * images:
        raise UserError(
            f"{damaged} of {images} images are damaged, more than the allowed share "
            f"{config.max_damaged:g} (max_damaged); their names are in the log: ingest the data "
            "again, or check it with 'python jobs/ingest.py verify URI'."
        )


def _check_skipped(config: TrainConfig, in_a_row: int) -> None:
    if in_a_row >= config.max_skipped:
        raise UserError(
            f"{in_a_row} steps in a row were left out since their loss or gradient was not finite, "
            "as many as --max-skipped allows; lower --lr or look at a step with --replay, and go "
            "on from an earlier checkpoint with --init-from."
        )


@dataclass(frozen=True)
class _Fault:
    """What a worker knows about a step that is not finite."""

    rank: int
    own_loss: bool
    """Whether its own part of the loss is not finite."""
    first: int
    last: int
    dump: str | None = None
    note: str = ""


def _handle_nonfinite(
    learner: Learner,
    batch: dict[str, np.ndarray],
    result: StepResult,
    hooks: Hooks,
    world: World,
) -> None:
    """Dump the parts of the batch that are at fault and name them; every worker calls it.

    A worker is at fault if its own loss is not finite; if no loss is to blame, all may be.  A dump
    holds the weights after the steps that were begun since.
    """
    step = result.step
    own = _Fault(
        rank=world.rank,
        own_loss=not bool(torch.isfinite(result.losses[0])),
        first=int(batch["index"].min()),
        last=int(batch["index"].max()),
    )
    blamed = any(fault.own_loss for fault in _gathered(own, world))
    if own.own_loss or not blamed:
        own = _dumped(own, learner, batch, hooks, step)
    faults = [f for f in _gathered(own, world) if f.own_loss or not blamed]
    where = ", ".join(f"{f.first} to {f.last}" for f in faults)
    message = f"The loss or a gradient is not finite at step {step} (pairs {where})"
    message += "".join(f"; replay it with: python jobs/train.py --replay {f.dump}"
                       for f in faults if f.dump)  # fmt: skip
    message += "".join(f.note for f in faults)
    if learner.config.nonfinite == "stop":
        raise UserError(f"{message}; --nonfinite skip leaves such steps out.")
    if world.rank == 0:
        log.warning("%s; the step is left out", message)


def _gathered(fault: _Fault, world: World) -> list[_Fault]:
    """Return what every worker knows."""
    if world.size == 1:
        return [fault]
    faults: list[Any] = [None] * world.size
    dist.all_gather_object(faults, fault)
    return faults


def _dumped(
    fault: _Fault, learner: Learner, batch: dict[str, np.ndarray], hooks: Hooks, step: int
) -> _Fault:
    """Dump a worker's part of the batch, as long as there are not many dumps yet."""
    from lorat.learning.replay import dump

    if hooks.dumps is None or learner.num_skipped > MOST_DUMPS:
        return fault
    try:
        target = hooks.dumps.child(f"step-{step:08d}-rank-{fault.rank}")
        uri = dump(learner, batch, target, step=step)
    except (OSError, pa.ArrowException) as error:
        return dataclasses.replace(fault, note=f"; it cannot be dumped: {reason(error)}")
    return dataclasses.replace(fault, dump=uri)


def parts_line(metrics: dict[str, Any]) -> str:
    """Write where the time of a step goes, and how the hardware is used."""
    times = {name: metrics[f"system/time_ms/{name}"] for name in PARTS}
    if not times["replay"]:
        del times["replay"]
    parts = ", ".join(f"{name} {value:.1f}" for name, value in times.items())
    mfu = metrics.get("system/mfu")
    memory = ", ".join(
        f"{value:.1f} GB {name.rpartition('/')[2].replace('_', ' ')}"
        for name, value in metrics.items()
        if name.startswith("system/memory_gb/")
    )
    return (
        f"     step {metrics['system/step_ms']:.1f} ms ({parts}); "
        f"{metrics['system/samples_per_s_per_worker']:.1f} samples/s per worker; "
        + (f"MFU {100 * mfu:.0f} %; " if mfu is not None else "")
        + f"memory {memory}"
    )


def metrics_line(step: int, end_step: int, metrics: dict[str, Any], seconds_left: float) -> str:
    """Write the steady progress line: step, loss, samples/s, time left."""
    from lorat.learning.clock import duration

    width = len(str(end_step))
    return (
        f"step {step:{width}d}/{end_step}  loss {metrics['train/loss']:.4f}  "
        f"lr {metrics['lr']:.2e}  grad {metrics['grad_norm']:.2f}  "
        f"{metrics['system/samples_per_s']:.1f} samples/s  "
        f"stall {100 * metrics['system/data_stall_share']:.0f} %  "
        f"left {duration(seconds_left)}"
    )
