"""Deployable files of a tracker's network, each compared with PyTorch as it is written."""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import logging
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lorat.checkpoint.folder import load_merged, save_merged
from lorat.checkpoint.official import export_official, import_official
from lorat.config.fields import to_dict
from lorat.config.json_files import write_json
from lorat.config.tracking import TrackingConfig
from lorat.errors import UserError
from lorat.files.checksums import seal
from lorat.files.outputs import as_text, check_file, check_folder
from lorat.model.network import LoRAT
from lorat.model.normalisation import IMAGENET_MEAN, IMAGENET_STD

log = logging.getLogger(__name__)

FORMATS = ("bundle", "onnx", "program", "official")
INPUTS = ("template", "search", "foreground_mask")
OUTPUTS = ("score_map", "boxes")
TOLERANCE = 1e-3
"""Largest difference of a logit or of a normalised coordinate that passes as the same."""
MAX_ONNX_BYTES = 1_500_000_000
"""Weights above this go beside the ONNX file, which may not exceed 2 GB."""
CHECKED_BATCHES = (1, 3)

Forward = Callable[..., tuple[np.ndarray, np.ndarray]]
"""From template, search and mask to score map and boxes."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far an exported file is from PyTorch, on random inputs."""

    format: str
    file: str
    megabytes: float
    batches: tuple[int, ...]
    max_score_error: float
    """Largest difference of a logit of the score map."""
    max_box_error: float
    """Largest difference of a normalised coordinate."""
    milliseconds: float
    """Forward pass of one pair on this machine's CPU, median of 5."""
    passed: bool


class _Tuple(nn.Module):
    """The network with its outputs in a fixed order."""

    def __init__(self, model: LoRAT) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, template: Tensor, search: Tensor, foreground_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        outputs = self.model(template, search, foreground_mask)
        return outputs["score_map"], outputs["boxes"]


def random_inputs(model: LoRAT, batch: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Draw template (B, 3, T, T), search (B, 3, S, S) and foreground mask (B, h, h)."""
    variant = model.variant
    generator = torch.Generator().manual_seed(seed)
    size, grid = variant.template_size, variant.template_grid
    template = torch.randn(batch, 3, size, size, generator=generator)
    search = torch.randn(batch, 3, variant.search_size, variant.search_size, generator=generator)
    mask = torch.randint(0, 2, (batch, grid, grid), generator=generator)
    return template, search, mask


FILES = {"onnx": "model.onnx", "program": "model.pt2", "official": "official.safetensors"}
"""Names of the formats that are a file."""


def check_place(folder: Path, formats: tuple[str, ...] = FORMATS) -> None:
    """Refuse a folder in which :func:`export` could not write; nothing is made.

    Raises:
        UserError: if it is a file or cannot be written, or one of the files is a folder.
    """
    check_folder(folder)
    if "bundle" in formats:
        check_folder(folder / "bundle")
    for name in ("parity.json", "parity.md", *(FILES[f] for f in formats if f in FILES)):
        check_file(folder / name)


def export(model: LoRAT, folder: Path, formats: tuple[str, ...] = FORMATS) -> list[Parity]:
    """Write the formats into ``folder``, compare each with PyTorch, and write ``parity.json``.

    ``SHA256SUMS`` lists the files.

    Args:
        model: any form; adapters are folded in.
        folder: made if needed.
        formats: some of :data:`FORMATS`: ``bundle`` (safetensors), ``onnx``, ``program``
            (torch.export), ``official`` (a file as LoRAT releases them, adapters kept).

    Returns:
        One report per format; a format whose errors exceed :data:`TOLERANCE` has not passed.

    Raises:
        UserError: for an unknown format, if the packages for ONNX are not installed, or if the
            model's outputs are not finite.
    """
    unknown = sorted(set(formats) - set(FORMATS))
    if unknown or not formats:
        raise UserError(f"There is no format {unknown or ''}; choose from {', '.join(FORMATS)}.")
    merged = model.merge() if model.adaptation is not None else model
    merged = copy.deepcopy(merged).float().eval()
    folder.mkdir(parents=True, exist_ok=True)
    writers: dict[str, Callable[[LoRAT, Path], Parity]] = {
        "bundle": _bundle,
        "onnx": _onnx,
        "program": _program,
        "official": functools.partial(_official, model),
    }
    with as_text(folder) as place:
        reports = [writers[name](merged, place) for name in formats]
    content = {"variant": merged.variant.name, "tolerance": TOLERANCE}
    rows = [
        # JSON knows no NaN, which an error is where the exported network gives none.
        {k: None if isinstance(v, float) and not math.isfinite(v) else v
         for k, v in asdict(report).items()}
        for report in reports
    ]  # fmt: skip
    write_json(content | {"formats": rows}, folder / "parity.json")
    written = [
        *folder.glob(f"{FILES['onnx']}*"),
        *(folder / FILES[n] for n in FILES if n != "onnx"),
    ]
    seal(folder, "parity.json", *(file.name for file in written if file.is_file()))
    return reports


def _bundle(model: LoRAT, folder: Path) -> Parity:
    path = folder / "bundle"
    save_merged(model, path)
    size = sum(file.stat().st_size for file in path.iterdir())
    return _compare("bundle", path, size, model, _forward(load_merged(path)))


def _official(given: LoRAT, merged: LoRAT, folder: Path) -> Parity:
    path = folder / FILES["official"]
    if given.tracking != TrackingConfig():
        log.warning(
            "%s has no place for how to track, so that whoever reads it tracks as published; this "
            "model has %s.",
            path.name, to_dict(given.tracking),
        )  # fmt: skip
    export_official(given, path)
    again = import_official(path, given.variant, backbone="none")  # the file has it all
    return _compare("official", path, path.stat().st_size, merged, _forward(again.eval()))


def _forward(model: LoRAT) -> Forward:
    network = _Tuple(model)

    def run(*inputs: Tensor) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            scores, boxes = network(*inputs)
        return scores.numpy(), boxes.numpy()

    return run


def _onnx(model: LoRAT, folder: Path) -> Parity:
    missing = [n for n in ("onnx", "onnxruntime", "onnxscript") if not importlib.util.find_spec(n)]
    if missing:
        raise UserError(
            f"ONNX needs {', '.join(missing)}; install them with: pip install 'lorat[export]'."
        )
    path = folder / FILES["onnx"]
    size = sum(value.nbytes for value in model.state_dict().values())
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        with warnings.catch_warnings():  # of torch and onnxscript about their own insides
            warnings.simplefilter("ignore")
            torch.onnx.export(
                _Tuple(model),
                random_inputs(model, 2),
                f"{scratch}/{path.name}",
                input_names=list(INPUTS),
                output_names=list(OUTPUTS),
                dynamic_shapes={name: {0: torch.export.Dim("batch")} for name in INPUTS},
                dynamo=True,
                external_data=size > MAX_ONNX_BYTES,
                verbose=False,
            )
        _describe(Path(scratch, path.name), model)
        files = [Path(scratch, name) for name in os.listdir(scratch)]
        size = sum(file.stat().st_size for file in files)
        for file in files:
            os.replace(file, folder / file.name)
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> tuple[np.ndarray, np.ndarray]:
        feed = {name: value.numpy() for name, value in zip(INPUTS, inputs, strict=True)}
        scores, boxes = session.run(list(OUTPUTS), feed)
        return np.asarray(scores), np.asarray(boxes)

    return _compare("onnx", path, size, model, run)


def contract(model: LoRAT) -> dict[str, Any]:
    """Return what a program has to know that tracks with the ONNX file alone.

    The file carries it as JSON under the metadata key ``lorat``.
    """
    variant, tracking = model.variant, model.tracking
    factor = tracking.search_area_factor or variant.search_area_factor
    return {
        "variant": variant.name,
        "template": {"size": variant.template_size, "area_factor": variant.template_area_factor},
        "search": {"size": variant.search_size, "area_factor": factor},
        "patch_size": variant.patch_size,
        "channels": "RGB",
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "foreground_mask": "1 for the template's patches that the box touches, else 0",
        "score_map": "logits",
        "boxes": "xyxy, 0 to 1 of the search crop",
        "window_penalty": tracking.window_penalty,
        "min_object_size": tracking.min_object_size,
    }


def _describe(path: Path, model: LoRAT) -> None:
    import onnx

    content = onnx.load(str(path), load_external_data=False)
    onnx.helper.set_model_props(content, {"lorat": json.dumps(contract(model))})
    onnx.save(content, str(path))


def _program(model: LoRAT, folder: Path) -> Parity:
    path = folder / FILES["program"]
    shapes = {name: {0: torch.export.Dim("batch")} for name in INPUTS}
    program = torch.export.export(
        _Tuple(model), random_inputs(model, 2), dynamic_shapes=shapes, strict=False
    )
    torch.export.save(program, str(path))
    again = torch.export.load(str(path)).module()

    def run(*inputs: Tensor) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            scores, boxes = again(*inputs)
        return scores.numpy(), boxes.numpy()

    return _compare("program", path, path.stat().st_size, model, run)


def _compare(name: str, path: Path, size: int, model: LoRAT, run: Forward) -> Parity:
    reference = _Tuple(model)
    score_error = box_error = 0.0
    for batch in CHECKED_BATCHES:
        inputs = random_inputs(model, batch, seed=batch)
        with torch.no_grad():
            scores, boxes = reference(*inputs)
        if not (torch.isfinite(scores).all() and torch.isfinite(boxes).all()):
            raise UserError(
                "The model gives values that are not finite, so nothing can be compared with it; "
                "export the checkpoint of a training that did not diverge."
            )
        found_scores, found_boxes = run(*inputs)
        # Unlike max(), this keeps a NaN, which no file that is the same gives.
        score_error = np.maximum(score_error, np.abs(found_scores - scores.numpy()).max())
        box_error = np.maximum(box_error, np.abs(found_boxes - boxes.numpy()).max())
    inputs, times = random_inputs(model, 1), []
    for _ in range(6):
        began = time.perf_counter()
        run(*inputs)
        times.append(time.perf_counter() - began)
    return Parity(
        format=name,
        file=path.name,
        megabytes=round(size / 1e6, 3),
        batches=CHECKED_BATCHES,
        max_score_error=float(score_error),
        max_box_error=float(box_error),
        milliseconds=round(float(np.median(times[1:])) * 1000, 3),
        passed=bool(np.maximum(score_error, box_error) <= TOLERANCE),
    )
