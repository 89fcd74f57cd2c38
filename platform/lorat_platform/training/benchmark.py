"""What the step loop costs beside bare PyTorch, and what LoRA saves beside full fine-tuning."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from torch import nn

from lorat.config.bounds import Bounds, Few, check_bounds
from lorat.config.fields import flag
from lorat.config.training import TrainConfig, resolve
from lorat.data.pairs.augment_draws import draw_augmentation
from lorat.data.pairs.batches import Batch
from lorat.errors import UserError
from lorat.learning.augment import augment, foreground_mask
from lorat.learning.clock import peak_flops
from lorat.learning.criterion import Criterion
from lorat.learning.learner import Learner, World, resolve_precision
from lorat.learning.loop import Hooks, run
from lorat.learning.optimisation import build_optimizer
from lorat.model.network import LoRAT, build_model
from lorat_platform import cluster
from lorat_platform.data.layout import Layout
from lorat_platform.data.sources import resolve_sources
from lorat_platform.data.stream import DecodePool, RayStream, split_stream

log = logging.getLogger(__name__)

WANTED_OVERHEAD = 0.03
"""Most time that the loop may add to bare PyTorch."""
MOST_STEPS = 40
"""Steps within which one must count: the first ones overflow the loss scale, which then falls."""


@dataclass(frozen=True, kw_only=True)
class TrainBenchmark:
    """Measure the step loop beside bare PyTorch on ready tensors, and memory of LoRA and full."""

    variant: str = "T-112"
    """Model, such as T-112 or S-224; its weights are random."""
    batch_size: Annotated[int, Bounds(1, 65_536)] = 16
    """Pairs in a step, 1 to 65,536."""
    steps: Annotated[int, Bounds(1, 1_000_000)] = 10
    """Steps in a measurement, 1 to 1,000,000."""
    rounds: Annotated[int, Bounds(1, 1000)] = 9
    """Measurements of each kind, in turn, 1 to 1000; the medians are compared."""
    precision: str = "auto"
    """As for training."""
    compile: str = "auto"
    """As for training, for both."""
    form: Literal["folded", "usual"] = "folded"
    """How adapters are computed: as without dropout, or in the usual form, which they have with
    dropout, where nothing is dropped."""
    measure: Literal["all", "speed", "memory", "lora-memory"] = "all"
    """Speed is the step loop beside bare PyTorch, memory is that of LoRA and full, or of LoRA
    alone."""
    threads: Few | None = None
    """Torch threads on a CPU, 1 to 1024; none means one per CPU."""
    data: str | None = None
    """Also measure the share of time spent waiting for these shards (synthetic for the synthetic
    ones), decoded beside the training."""

    def __post_init__(self) -> None:
        check_bounds(self, flag)


class ReadySource:
    """The same batch for ever."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Yield the batch."""
        return itertools.repeat(self._batch)


def benchmark_train(options: TrainBenchmark) -> dict[str, float]:
    """Run the benchmark, print its table and return its figures."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.threads:
        torch.set_num_threads(options.threads)
    log.info(
        "%s, %d pairs, precision %s, %s, adapters %s",
        options.variant, options.batch_size, options.precision, device.type, options.form,
    )  # fmt: skip
    figures: dict[str, float] = {}
    if options.measure in ("all", "speed"):
        figures |= speed(options, device)
    if options.measure != "speed":
        figures |= memory(options, device)
    if options.data is not None:
        figures["stall"] = stall(options, device)
        log.info("  data-stall share      %8.1f %%", 100 * figures["stall"])
    return figures


def speed(options: TrainBenchmark, device: torch.device) -> dict[str, float]:
    """Measure the step loop beside bare PyTorch, in turns."""
    config = _config(options, "lora")
    batch = random_batch(config, options.batch_size)
    learner = Learner(config, world=World(device=device), model=_model(config, options))
    bare = Bare(config, device, batch, _model(config, options))
    bare.steps(2)
    bare_s: list[float] = []
    parts: list[dict[str, float]] = []

    def compare(step: int, metrics: dict[str, float]) -> None:
        parts.append(metrics)
        bare_s.append(timed(lambda: bare.steps(options.steps), device) / options.steps)
        learner.clock.reset()

    hooks = Hooks(log_every=options.steps, on_interval=compare)
    end = (options.rounds + 1) * options.steps
    source = ReadySource(batch)
    run(config, source, world=learner.world, learner=learner, hooks=hooks, end_step=end)
    parts, bare_s = parts[1:], bare_s[1:]  # the first is for warming up
    loop_ms = statistics.median(metrics["system/step_ms"] for metrics in parts)
    bare_ms = 1e3 * statistics.median(bare_s)
    overhead = loop_ms / bare_ms - 1
    peak, origin = peak_flops(device)
    figures = {"bare_ms": bare_ms, "loop_ms": loop_ms, "overhead": overhead}
    log.info("  bare PyTorch          %8.2f ms a step", bare_ms)
    log.info(
        "  step loop             %8.2f ms a step, %+.1f %% (wanted at most %+.0f %%)",
        loop_ms, 100 * overhead, 100 * WANTED_OVERHEAD,
    )  # fmt: skip
    for name in ("data", "copy", "augment", "forward", "backward", "optimiser", "replay"):
        value = statistics.median(metrics[f"system/time_ms/{name}"] for metrics in parts)
        figures[f"{name}_ms"] = value
        log.info("    %-18s %8.2f ms", name, value)
    mfu = statistics.median(m.get("system/mfu", float("nan")) for m in parts)
    figures["mfu"] = mfu
    log.info(
        "  MFU                   %8.1f %% of %.3g TFLOP/s (%s)", 100 * mfu, peak / 1e12, origin
    )
    return figures


def _model(config: TrainConfig, options: TrainBenchmark) -> LoRAT:
    """Build the model, its adapters in the form that is asked for."""
    model = build_model(config)
    if options.form == "usual":
        for module in model.modules():
            dropouts = getattr(module, "lora_dropout", None)
            if isinstance(dropouts, nn.ModuleDict):
                # Drops nothing at no cost, but is a dropout, with which nothing can be folded.
                dropouts.update({name: nn.Dropout(0.0) for name in dropouts})
    return model


def _config(options: TrainBenchmark, adaptation: str) -> TrainConfig:
    config = TrainConfig(
        variant=options.variant,
        backbone="none",
        adaptation=adaptation,  # type: ignore[arg-type]
        batch_size=options.batch_size,
        precision=options.precision,  # type: ignore[arg-type]
        compile=options.compile,  # type: ignore[arg-type]
    )
    return resolve(dataclasses.replace(config, epochs=1_000, pairs_per_epoch=1_000_000))


def random_batch(config: TrainConfig, num_pairs: int) -> Batch:
    """Return noise with boxes, as a decoder would give it."""
    rng = np.random.default_rng(0)
    variant = config.model_variant
    batch: Batch = {"index": np.arange(num_pairs)}
    for role, size in (("template", variant.template_size), ("search", variant.search_size)):
        low = rng.uniform(0.2, 0.4, (num_pairs, 2))
        box = np.concatenate([low, low + rng.uniform(0.2, 0.4, (num_pairs, 2))], axis=1)
        batch[role] = rng.integers(0, 256, (num_pairs, size, size, 3), dtype=np.uint8)
        batch[f"{role}_box"] = (box * size).astype(np.float32)
    batch["augment"] = np.array(
        [draw_augmentation(config.augment, rng) for _ in range(num_pairs)], dtype=np.float32
    )
    for name in ("bytes_read", "damaged", "dataset"):
        batch[name] = np.zeros(num_pairs, np.int64)
    return batch


class Bare:
    """The same forward, backward and optimiser on tensors that are ready for the model."""

    def __init__(
        self, config: TrainConfig, device: torch.device, batch: Batch, model: LoRAT
    ) -> None:
        self._device = device
        self._dtype = resolve_precision(config, device)
        self._clip = config.clip_norm
        self._model = model.to(device)
        self._optimizer = build_optimizer(self._model, config)
        self._parameters = self._model.trainable_parameters()
        self._criterion = Criterion()
        self._scaler = torch.amp.GradScaler("cuda", enabled=self._dtype is torch.float16)
        if config.compile == "on" or (config.compile == "auto" and device.type == "cuda"):
            self._model.compile(dynamic=False)
        names = ("template", "search", "template_box", "search_box", "augment")
        on_device = {name: torch.from_numpy(batch[name]).to(device) for name in names}
        with torch.no_grad():
            template, search, template_box, search_box = augment(on_device)
        self._inputs = template, search, foreground_mask(template_box, self._model.variant)
        self._target = search_box / config.model_variant.search_size

    def steps(self, count: int) -> None:
        """Take steps."""
        for _ in range(count):
            enabled = self._dtype is not None
            with torch.autocast(self._device.type, self._dtype or torch.float32, enabled=enabled):
                outputs = self._model(*self._inputs)
            loss = self._criterion(outputs, self._target)["loss"]
            self._scaler.scale(loss).backward()
            self._scaler.unscale_(self._optimizer)
            torch.nn.utils.clip_grad_norm_(self._parameters, self._clip)
            self._scaler.step(self._optimizer)
            self._scaler.update()
            self._optimizer.zero_grad(set_to_none=True)


def timed(work: Callable[[], None], device: torch.device) -> float:
    """Return the seconds that a call takes, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def memory(options: TrainBenchmark, device: torch.device) -> dict[str, float]:
    """Measure gradients, optimiser state (and on CUDA the peak) of LoRA and full.

    Raises:
        UserError: if no step counts, which the weights' numbers do not allow then.
    """
    figures: dict[str, float] = {}
    for adaptation in ("lora",) if options.measure == "lora-memory" else ("lora", "full"):
        config = _config(options, adaptation)
        batch = random_batch(config, options.batch_size)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        uncompiled = dataclasses.replace(config, compile="off")
        model = _model(config, options)
        learner = Learner(uncompiled, world=World(device=device), model=model)
        seen: dict[str, int] = {}

        def look(*_: object, model: torch.nn.Module = learner.model, seen: dict = seen) -> None:
            held = [p.grad for p in model.parameters() if p.grad is not None]
            seen["gradients"] = sum(g.numel() * g.element_size() for g in held)

        learner.optimizer.register_step_pre_hook(look)
        state: list[torch.Tensor] = []
        while not any(tensor.any() for tensor in state):  # all zeros until a step counts
            if learner.step == MOST_STEPS:
                raise UserError(
                    f"No step of {MOST_STEPS} counted: loss or gradient was never finite in "
                    f"{options.precision}; give another --precision."
                )
            end = learner.step + 1
            run(uncompiled, ReadySource(batch), world=learner.world, learner=learner, end_step=end)
            state = [v for s in learner.optimizer.state.values() for v in s.values() if v.ndim]
        seen["optimiser"] = sum(v.numel() * v.element_size() for v in state)
        text = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in seen.items())
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
            figures[f"{adaptation}_peak_mb"] = peak / 1e6
            text += f", peak {peak / 1e6:.0f} MB"
        figures |= {f"{adaptation}_{name}_mb": size / 1e6 for name, size in seen.items()}
        log.info("  %-4s                  %s", adaptation, text)
        del learner, model, state
    return figures


def stall(options: TrainBenchmark, device: torch.device) -> float:
    """Return the share of time that training waits for the stream, decoded beside it by Ray Data.

    As in a training job, the decoders run on what the torch threads leave of the CPUs.
    """
    config = _config(options, "lora")
    sources = resolve_sources(options.data or "synthetic", "train")
    end = options.steps * 3
    layout = Layout.plan(config, 1, 0, end)
    shares: list[float] = []

    def keep(step: int, metrics: dict[str, float]) -> None:
        shares.append(metrics["system/data_stall_share"])

    with cluster.connected("local") as ray_cluster:
        on_cpu = 0 if device.type == "cuda" else torch.get_num_threads()
        pool = DecodePool.plan(worker_cpus=on_cpu, cluster_cpus=ray_cluster.cpus)
        (iterator,) = split_stream(config, sources, layout, pool)
        hooks = Hooks(log_every=options.steps, on_interval=keep)
        source = RayStream(iterator, layout, 0)
        run(config, source, world=World(device=device), hooks=hooks, end_step=end)
    return statistics.mean(shares[1:])  # the first interval starts the pipeline
