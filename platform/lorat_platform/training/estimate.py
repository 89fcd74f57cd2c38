"""What a training will need, before anything is started: sizes, memory, work, bytes."""

from __future__ import annotations

import os
from dataclasses import dataclass

import psutil
import torch

from lorat.config.training import TrainConfig
from lorat.errors import UserError
from lorat.learning.clock import PEAK_FLOPS, duration, peak_flops
from lorat.model.complexity import Description, describe
from lorat_platform.data.layout import local_range, pair_bytes
from lorat_platform.data.sources import SYNTHETIC, SYNTHETIC_PRETRAIN, parse_sources
from lorat_platform.training.options import RunOptions

ASSUMED_MFU = 0.35
"""Share of the peak that a forecast assumes."""
FORECAST_GPU = "A100"
"""GPU of the forecast where the one of the training is not at hand."""


def training_memory(
    config: TrainConfig, about: Description, pairs: int, *, on_gpu: bool = True
) -> dict[str, int]:
    """Estimate the bytes that one worker holds on its device.

    Activations are counted as what the backward pass of a pre-norm block keeps, per token about
    two layer norms, q, k, v, attention, two residuals (8 D) and the FFN's hidden layer before and
    after its activation; adapters keep their rank.  Fused attention keeps no N × N map.

    Args:
        config: resolved.
        about: of the same configuration.
        pairs: pairs in one forward pass.
        on_gpu: what the precision auto means half precision on.
    """
    variant = config.model_variant
    frozen = about.total_training_params - about.trainable_params
    half = config.precision in ("fp16", "bf16") or (config.precision == "auto" and on_gpu)
    tokens = variant.template_grid**2 + variant.search_grid**2
    per_token = 8 * variant.dim + (3 if variant.ffn == "swiglu" else 2) * variant.ffn_hidden
    if config.adaptation == "lora":
        per_token += len(config.lora.targets) * config.lora.rank
    if config.adaptation == "head":
        per_token = 0
    blocks = variant.depth
    kept = blocks * per_token
    if config.activation_checkpointing:
        kept = blocks * variant.dim + per_token
    width = 2 if half else 4
    return {
        "frozen weights": frozen * (2 if config.frozen_dtype == "bf16" else 4),
        "trained weights": about.trainable_params * 4,
        "gradients": about.trainable_params * 4,
        "AdamW state": about.trainable_params * 8,
        "activations": pairs * tokens * kept * width,
        "crops": pairs * (pair_bytes(variant) + 4 * pair_bytes(variant)),
    }


def estimate(config: TrainConfig, options: RunOptions) -> str:
    """Describe sizes, memory, work and bytes of a resolved configuration.

    Raises:
        UserError: if there are more workers than pairs in a batch.
    """
    assert config.batch_size is not None
    about = describe(config.model_variant, config)
    low, high = options.workers_for(config.batch_size)
    first, last = local_range(config.batch_size, high, 0)
    pairs = min(last - first, config.micro_batch or last - first)
    # Without an address auto means this machine; a cluster that is named may well have GPUs.
    elsewhere = options.address is not None or "RAY_ADDRESS" in os.environ
    on_gpu = options.device == "gpu" or (
        options.device == "auto" and (elsewhere or torch.cuda.is_available())
    )
    memory = training_memory(config, about, pairs, on_gpu=on_gpu)
    full = training_memory(config, _full(config), pairs, on_gpu=on_gpu)
    total, total_full = sum(memory.values()), sum(full.values())
    step_flops = about.train_flops * config.batch_size
    run_flops = step_flops * config.total_steps
    device = _Device.find(on_gpu)
    # All workers share the CPUs of a machine.
    at_once = high if on_gpu else 1
    rate = at_once * ASSUMED_MFU * device.peak / about.train_flops
    seconds = config.total_steps * config.batch_size / rate
    per_pair, source = _bytes_per_pair(config)
    lines = [about.text, ""]
    workers = f"{low}" if low == high else f"{low} to {high}"
    lines += [
        f"device       {device.text}",
        f"steps        {config.total_steps:,} of {config.batch_size} pairs, "
        f"{config.steps_per_epoch:,} an epoch, {config.warmup_steps:,} of warm-up",
        f"workers      {workers}, {pairs} pairs in a forward pass",
        f"memory       {_size(total)} on each {'GPU' if on_gpu else 'CPU worker'}, an estimate "
        f"(full fine-tuning: {_size(total_full)})",
    ]
    work = (
        f"{run_flops / 1e18:,.2f} EFLOP" if run_flops > 1e16 else f"{run_flops / 1e12:,.1f} TFLOP"
    )
    lines += [f"  {name:<16} {_size(size):>10}" for name, size in memory.items()]
    lines += [
        f"work         {step_flops / 1e12:,.3f} TFLOP a step, {work} in all",
        f"speed        {rate:,.0f} samples/s, {duration(seconds)} in all, if "
        f"{at_once} x {device.name} reached {100 * ASSUMED_MFU:.0f} % of "
        f"{device.peak / 1e12:.3g} TFLOP/s",
        f"data         {per_pair / 1e3:,.0f} kB per pair ({source}), {_size(rate * per_pair)}/s at "
        f"that speed; {_size(rate * pair_bytes(config.model_variant))}/s of crops to the workers",
    ]
    return "\n".join(lines)


def _full(config: TrainConfig) -> Description:
    import dataclasses

    return describe(config.model_variant, dataclasses.replace(config, adaptation="full"))


@dataclass(frozen=True, kw_only=True)
class _Device:
    """What a training would run on."""

    name: str
    text: str
    peak: float
    """FLOP/s of one of it."""

    @classmethod
    def find(cls, on_gpu: bool) -> _Device:
        """Describe what is on this machine; a GPU that is not is taken for a usual one."""
        if not on_gpu:
            cores, memory = torch.get_num_threads(), psutil.virtual_memory()
            text = f"CPU, {cores} cores, {_size(memory.available)} of memory free; no GPU is used"
            return cls(name="this CPU", text=text, peak=peak_flops(torch.device("cpu"))[0])
        if not torch.cuda.is_available():
            text = f"no GPU is at hand; one like the {FORECAST_GPU} is assumed where it will run"
            return cls(name=FORECAST_GPU, text=text, peak=PEAK_FLOPS[FORECAST_GPU])
        gpu = torch.device("cuda", 0)
        peak, origin = peak_flops(gpu)
        name, memory = origin.split(",")[0], torch.cuda.get_device_properties(gpu).total_memory
        text = f"{torch.cuda.device_count()} x {name}, each with {_size(memory)} of memory"
        if peak != peak:
            text += f"; its speed is not known, that of the {FORECAST_GPU} is taken"
            peak = PEAK_FLOPS[FORECAST_GPU]
        return cls(name=name, text=text, peak=peak)


def _bytes_per_pair(config: TrainConfig) -> tuple[float, str]:
    """Return the mean bytes of a pair's two images, weighted as the mixture is."""
    from lorat.data.shards.frame_index import FrameIndex

    total = weights = 0.0
    for source in parse_sources(config.data):
        if source.uri in (SYNTHETIC, SYNTHETIC_PRETRAIN):
            return 2 * 18_000.0, "typical of the synthetic data"
        try:
            index = FrameIndex.open(source.uri)
        except UserError:
            return 2 * 40_000.0, "assumed, the data is not there"
        total += source.weight * 2 * float(index.length.mean())
        weights += source.weight
    return total / weights, "mean of the data"


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 1000 or unit == "TB":
            return f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1000
    raise AssertionError
