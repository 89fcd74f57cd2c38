"""Batches that gave a loss or gradient that is not finite: written, and tried again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import torch

from lorat import checkpoint
from lorat.config.json_files import read_json
from lorat.errors import UserError, reason
from lorat.files.scratch import temporary_folder
from lorat.files.storage import Location, locate
from lorat.files.tensors import read_safetensors, write_tensors
from lorat.learning.augment import augment, foreground_mask

if TYPE_CHECKING:
    from lorat.learning.learner import Learner


def dump(
    learner: Learner,
    batch: dict[str, np.ndarray],
    target: Location,
    *,
    step: int | None = None,
) -> str:
    """Write the batch, the weights as they are, and where that was; return the address.

    Args:
        learner: whose weights, which the batch met, on CUDA one step before.
        batch: this worker's part.
        target: the folder.
        step: of the batch; none means the last one.

    Raises:
        OSError: if there is no room, or the storage cannot be reached.
    """
    with temporary_folder() as scratch:
        _write(learner, batch, scratch, learner.step - 1 if step is None else step)
        target.filesystem.create_dir(target.path, recursive=True)
        pafs.copy_files(
            str(scratch), target.path, destination_filesystem=target.filesystem, use_threads=False
        )
    return target.uri


def _write(learner: Learner, batch: dict[str, np.ndarray], folder: Path, step: int) -> None:
    write_tensors(
        {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in batch.items()},
        folder / "batch.safetensors",
    )
    checkpoint.save(learner.model, learner.config, folder / "checkpoint")
    content = {
        "step": step,
        "rank": learner.world.rank,
        "pairs": batch["index"].tolist(),
        "precision": str(learner.amp_dtype or torch.float32).removeprefix("torch."),
    }
    (folder / "dump.json").write_text(json.dumps(content, indent=2) + "\n")


Precision = Literal["float32", "float16", "bfloat16"]


def replay(uri: str) -> str:
    """Run a dump forward and backward, pair by pair, and say which pairs are at fault.

    Raises:
        UserError: if the address holds no dump.
    """
    location = locate(uri)
    if location.is_local:
        return _replay(Path(location.path))
    with temporary_folder() as scratch:
        try:
            pafs.copy_files(
                location.path,
                str(scratch),
                source_filesystem=location.filesystem,
                use_threads=False,
            )
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"{uri} cannot be read ({reason(error)}); give the address that the message named."
            ) from error
        return _replay(scratch)


def _replay(folder: Path) -> str:
    content = read_json(
        folder / "dump.json",
        "give the folder that the message named",
        shape={"step": int, "rank": int, "pairs": [int], "precision": Precision},
    )
    arrays = read_safetensors(folder / "batch.safetensors")
    from lorat.learning.criterion import Criterion
    from lorat.learning.learner import step_seed

    model = checkpoint.load(folder / "checkpoint")
    variant, criterion = model.variant, Criterion()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device).train()
    dtype = getattr(torch, content["precision"])
    enabled = dtype is not torch.float32 and (device.type == "cuda" or dtype is torch.bfloat16)
    lines = [f"step {content['step']}, worker {content['rank']}, {content['precision']}"]
    broken = [n for n, p in model.named_parameters() if not torch.isfinite(p).all()]
    if broken:
        lines.append(f"weights that are not finite: {', '.join(broken)}")
    num_bad = 0
    seed = model.config.seed if model.config is not None else 0
    # Repeatable, though not the draws of then, which were those of a whole batch.
    torch.manual_seed(step_seed(seed, content["step"], content["rank"]))
    for row, pair in enumerate(content["pairs"]):
        one = {k: v[row : row + 1].clone().to(device) for k, v in arrays.items()}
        template, search, template_box, search_box = augment(one)
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype, enabled=enabled):
            outputs = model(template, search, foreground_mask(template_box, variant))
        losses = criterion(outputs, search_box / variant.search_size)
        losses["loss"].backward()
        gradients = [p.grad for p in model.trainable_parameters() if p.grad is not None]
        norm = torch.stack([g.norm() for g in gradients]).norm()
        fine = bool(torch.isfinite(losses["loss"]) and torch.isfinite(norm))
        num_bad += not fine
        if not fine:
            lines.append(
                f"pair {pair}: loss {float(losses['loss'].detach()):g}, gradient norm "
                f"{float(norm):g}, template box {one['template_box'][0].tolist()}, search box "
                f"{one['search_box'][0].tolist()}"
            )
    lines.append(
        f"{num_bad} of {len(content['pairs'])} pairs give a loss or gradient that is not finite"
    )
    return "\n".join(lines)
