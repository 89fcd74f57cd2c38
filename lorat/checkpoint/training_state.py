"""What resuming needs beside the weights: optimiser, loss scaler, position."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from lorat.config.bounds import Bounds
from lorat.config.json_files import read_json, write_json
from lorat.errors import UserError
from lorat.files import checksums
from lorat.files.tensors import read_safetensors, write_tensors
from lorat.model.network import differences


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """Where a training stands."""

    step: int
    """Optimiser steps taken."""
    extra: dict[str, Any]
    """What the caller gave to :func:`save_training_state`."""


STATE_FILE, OPTIMIZER_FILE = "training_state.json", "optimizer.safetensors"
_SHAPE = {"step": Annotated[int, Bounds(0, 10**15)], "scaler": dict | None, "extra": dict}


def read_step(folder: Path | str) -> int:
    """Return the optimiser steps that a checkpoint was written after.

    Raises:
        UserError: if its state is missing or damaged.
    """
    return _read(Path(folder))["step"]


def _read(folder: Path) -> dict[str, Any]:
    checksums.check(folder, STATE_FILE)
    return read_json(folder / STATE_FILE, "give another checkpoint of the run", shape=_SHAPE)


def _named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters by name, whatever DDP or torch.compile wrapped around."""
    return {
        name.replace("_orig_mod.", "").removeprefix("module."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def save_training_state(
    folder: Path | str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    step: int,
    scaler: torch.amp.GradScaler | None = None,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write what resuming needs beside the weights: optimiser, loss scaler, position.

    Args:
        folder: usually the checkpoint's.
        model: holds the parameters, wrapped or not.
        optimizer: its moments are stored under the parameters' names.
        step: optimiser steps taken.
        scaler: loss scaler, if there is one.
        extra: JSON values of the caller.
    """
    folder = Path(folder)
    tensors: dict[str, Tensor] = {}
    for name, parameter in _named_parameters(model).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{key}"] = torch.as_tensor(value)
    write_tensors(tensors, folder / OPTIMIZER_FILE)
    content = {
        "step": step,
        "scaler": None if scaler is None else scaler.state_dict(),
        "extra": extra or {},
    }
    write_json(content, folder / STATE_FILE)
    checksums.seal(folder, OPTIMIZER_FILE, STATE_FILE)


def load_training_state(
    folder: Path | str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    scaler: torch.amp.GradScaler | None = None,
) -> TrainingState:
    """Put optimiser and loss scaler back as they were; learning rates follow from the step.

    Raises:
        UserError: if something is missing or damaged, or the moments belong to other parameters,
            all names at once.
    """
    folder = Path(folder)
    content = _read(folder)
    checksums.check(folder, OPTIMIZER_FILE)
    tensors = read_safetensors(folder / OPTIMIZER_FILE)
    parameters = _named_parameters(model)
    shapes = {n: tuple(p.shape) for n, p in parameters.items()}
    found = {n.rpartition("/")[0]: tuple(v.shape) for n, v in tensors.items() if v.ndim}
    problems = differences(shapes, found) if tensors else None
    if problems:
        raise UserError(f"The optimiser state in {folder} is of another model: {problems}.")
    for name, value in tensors.items():
        owner, _, key = name.rpartition("/")
        parameter = parameters[owner]
        optimizer.state[parameter][key] = value.to(parameter.device)
    if scaler is not None and content["scaler"]:
        scaler.load_state_dict(content["scaler"])
    return TrainingState(step=content["step"], extra=content["extra"])
