"""Checkpoints: what was trained, the state of the training, and the deployable form.

Everything is safetensors and JSON; nothing is pickled.  A checkpoint folder holds

- ``config.json``: format, variant, training configuration, origin of the frozen weights;
- ``head.safetensors``: head and token types;
- ``adapter/adapter_config.json`` and ``adapter/adapter_model.safetensors`` with LoRA, as peft
  writes and opens them for a plain timm model: one adapter for the fused q, k and v;
- ``backbone.safetensors``: the transformer, with the full backbone trained or where it cannot be
  had again (random, shipped with the package).

A deployable folder holds ``config.json`` and ``model.safetensors`` and loads without peft.

Both carry ``SHA256SUMS``, with which every file is compared before it is used.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorat.checkpoint.training_state import (
    TrainingState,
    load_training_state,
    save_training_state,
)
from lorat.config.fields import from_dict, shown, to_dict
from lorat.config.json_files import check_shape, read_json, write_json
from lorat.config.tracking import TrackingConfig
from lorat.config.training import HeadConfig, TrainConfig
from lorat.config.variants import VARIANTS, Variant, get_variant
from lorat.errors import UserError
from lorat.files import checksums
from lorat.files.tensors import read_safetensors, write_tensors
from lorat.model.backbone import fingerprint, plain_weights, read_backbone, write_backbone
from lorat.model.network import LoRAT, assemble, differences, load_weights

__all__ = [
    "TrainingState",
    "load",
    "load_merged",
    "load_training_state",
    "read_config",
    "save",
    "save_backbone",
    "save_merged",
    "save_training_state",
    "warm_start",
]

FORMAT, MERGED_FORMAT = "lorat", "lorat-merged"
VERSIONS = {FORMAT: 2, MERGED_FORMAT: 1}
"""Of each format, written and read; version 1 of the first had an adapter of q, k and v apart."""
CONFIG_FILE, HEAD_FILE, BACKBONE_FILE = "config.json", "head.safetensors", "backbone.safetensors"
ADAPTER_FILE = "adapter/adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter/adapter_config.json"
MODEL_FILE = "model.safetensors"
_HEADERS: dict[str, Any] = {
    FORMAT: {
        "variant": dict,
        "config": dict,
        "backbone": {"source": str, "fingerprint": str, "included": bool},
    },
    MERGED_FORMAT: {
        "variant": dict,
        "head_depth": int,
        "tracking?": TrackingConfig,
        "backbone": {"source": str},
    },
}
"""What a header says, by format."""


def save(model: LoRAT, config: TrainConfig, folder: Path | str) -> None:
    """Write what was trained, and those frozen weights that no public or user's file gives again.

    Args:
        model: unmerged, as :func:`lorat.model.network.build_model` made it.
        config: what it was built from.
        folder: made if needed; ``config.json`` is written last.

    Raises:
        UserError: if the model is a deployable one.
    """
    folder = Path(folder)
    if model.adaptation is None:
        raise UserError("A merged model has nothing left to train; write it with save_merged.")
    include_backbone = model.backbone_source in {"none", "shipped"} or model.adaptation == "full"
    if model.lora is not None:
        from lorat.model.adapter import adapter_weights, fused_peft_config

        write_tensors(adapter_weights(model.backbone), folder / ADAPTER_FILE)
        fused_peft_config(model.lora).save_pretrained(str(folder / "adapter"))
    write_tensors(_head_weights(model), folder / HEAD_FILE)
    if include_backbone:
        write_tensors(plain_weights(model.backbone), folder / BACKBONE_FILE)
    content = {
        "format": FORMAT,
        "version": VERSIONS[FORMAT],
        "variant": dataclasses.asdict(model.variant),
        "config": to_dict(config),
        "backbone": {
            "source": model.backbone_source,
            "fingerprint": fingerprint(model.backbone),
            "included": include_backbone,
        },
    }
    write_json(content, folder / CONFIG_FILE)
    written = [CONFIG_FILE, HEAD_FILE]
    written += [ADAPTER_FILE, ADAPTER_CONFIG_FILE] if model.lora is not None else []
    written += [BACKBONE_FILE] if include_backbone else []
    checksums.seal(folder, *written)


def _head_weights(model: LoRAT) -> dict[str, Tensor]:
    return {n: v for n, v in model.state_dict().items() if n.startswith(("head.", "embedding."))}


def read_config(folder: Path | str) -> TrainConfig:
    """Return the training configuration of a checkpoint folder."""
    content = _read_header(Path(folder), FORMAT)
    return from_dict(TrainConfig, content["config"])


def _read_header(folder: Path, *formats: str) -> dict[str, Any]:
    file, remedy = folder / CONFIG_FILE, "give an undamaged checkpoint"
    if file.exists():
        checksums.check(folder, CONFIG_FILE)
    content = read_json(file, remedy, shape={"format": str, "version?": int})
    found = content["format"]
    if found not in formats:
        raise UserError(
            f"{folder} has the format {shown(found)}; give a folder with {' or '.join(formats)}."
        )
    if content.get("version") != VERSIONS[found]:
        raise UserError(
            f"{folder} was written in version {content.get('version')} of the format, this program "
            f"reads version {VERSIONS[found]}; use the program that wrote it."
        )
    check_shape(content, str(file), remedy, _HEADERS[found])
    return content


def load(
    path: Path | str, *, variant: str | Variant | None = None, backbone: str | None = None
) -> LoRAT:
    """Load a checkpoint folder, a deployable folder, or a released LoRAT file, on the CPU.

    Args:
        path: the folder or file.
        variant: name or sizes; needed for a released file alone.
        backbone: where frozen weights come from that the checkpoint lacks; none means where they
            came from when it was written (for a released file: as ``auto``).

    Raises:
        UserError: if something is missing, damaged, of another shape, or belongs to another
            backbone.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"There is no checkpoint {path}; give an existing folder or file.")
    if path.is_file():
        from lorat.checkpoint.official import import_official

        if variant is None:
            raise UserError(
                f"{path} is a file of the released layout, which does not name its variant; "
                f"give variant, one of {', '.join(VARIANTS)}."
            )
        checksums.check_file(path)
        sizes = get_variant(variant) if isinstance(variant, str) else variant
        return import_official(path, sizes, backbone=backbone or "auto")
    header = _read_header(path, FORMAT, MERGED_FORMAT)
    if header["format"] == MERGED_FORMAT:
        return load_merged(path)
    return _load_own(path, header, backbone)


def _load_own(folder: Path, header: dict[str, Any], backbone: str | None) -> LoRAT:
    config: TrainConfig = from_dict(TrainConfig, header["config"])
    variant: Variant = from_dict(Variant, header["variant"])
    source: str = backbone or header["backbone"]["source"]
    if header["backbone"]["included"]:
        weights = _read_weights(folder, BACKBONE_FILE)
        source = header["backbone"]["source"]
    else:
        weights = read_backbone(source, variant)
    model = assemble(config, variant, weights, source=source)
    if (found := fingerprint(model.backbone)) != header["backbone"]["fingerprint"]:
        raise UserError(
            f"The backbone from {source} is not the one that {folder} was trained on "
            f"(fingerprint {found} instead of {header['backbone']['fingerprint']}); "
            "give backbone=FILE with the right one."
        )
    tensors = _read_weights(folder, HEAD_FILE)
    if model.lora is not None:
        from lorat.model.adapter import own_adapter_weights

        adapter = _read_weights(folder, ADAPTER_FILE)
        checksums.check(folder, ADAPTER_CONFIG_FILE)  # of those who load the adapter elsewhere
        tensors |= {
            f"backbone.{name}": value
            for name, value in own_adapter_weights(adapter, model.lora).items()
        }
    own = model.state_dict()
    learnt = {n: v for n, v in own.items() if ".lora_" in n or not n.startswith("backbone.")}
    problems = differences(
        {n: tuple(v.shape) for n, v in learnt.items()},
        {n: tuple(v.shape) for n, v in tensors.items()},
    )
    if problems:
        raise UserError(f"{folder} does not fit its configuration: {problems}; give another.")
    model.load_state_dict(tensors, strict=False)
    return model


def _read_weights(folder: Path, name: str) -> dict[str, Tensor]:
    if (folder / name).exists():
        checksums.check(folder, name)
    return read_safetensors(folder / name)


def warm_start(
    model: LoRAT,
    path: Path | str,
    *,
    variant: str | Variant | None = None,
    backbone: str | None = None,
) -> None:
    """Start a model from the weights of a checkpoint of any kind.

    Adapters are taken over if they are alike (rank, scaling, targets); otherwise they are folded
    into the base weights and the model's own adapters stay as drawn.

    Raises:
        UserError: as :func:`load`, and if sizes or head depths differ.
    """
    if variant is None and Path(path).is_file():
        variant = model.variant
    source = load(path, variant=variant, backbone=backbone)
    if model.lora is not None and source.lora is not None and _alike(model, source):
        load_weights(model, source.state_dict(), what="this model")
        model.backbone_source = source.backbone_source
        return
    plain = source.plain_state()
    names = {n.replace(".base_layer.", "."): n for n in model.state_dict() if ".lora_" not in n}
    adapters = {n: v for n, v in model.state_dict().items() if ".lora_" in n}
    weights = {names.get(n, n): v for n, v in plain.items()} | adapters
    load_weights(model, weights, what="this model")
    model.backbone_source = "none"


def _alike(a: LoRAT, b: LoRAT) -> bool:
    assert a.lora is not None and b.lora is not None
    keys = ("rank", "resolved_alpha", "rslora")
    same = all(getattr(a.lora, k) == getattr(b.lora, k) for k in keys)
    return same and set(a.lora.targets) == set(b.lora.targets)


def save_merged(model: LoRAT, folder: Path | str) -> None:
    """Write the deployable form: adapters folded in, one safetensors file and its JSON.

    Args:
        model: unmerged or merged.
        folder: made if needed.
    """
    folder = Path(folder)
    merged = model.merge() if model.adaptation is not None else model
    state = merged.state_dict()
    write_tensors(state, folder / MODEL_FILE)
    content = {
        "format": MERGED_FORMAT,
        "version": VERSIONS[MERGED_FORMAT],
        "variant": dataclasses.asdict(model.variant),
        "head_depth": model.head_depth,
        "tracking": to_dict(model.tracking),
        "dtype": str(next(iter(state.values())).dtype).removeprefix("torch."),
        "backbone": {"source": model.backbone_source},
    }
    write_json(content, folder / CONFIG_FILE)
    checksums.seal(folder, CONFIG_FILE, MODEL_FILE)


def load_merged(folder: Path | str) -> LoRAT:
    """Load the deployable form, on the CPU, in eval mode; peft is not needed.

    Raises:
        UserError: if something is missing, unexpected or misshapen, all names at once.
    """
    folder = Path(folder)
    header = _read_header(folder, MERGED_FORMAT)
    variant: Variant = from_dict(Variant, header["variant"])
    head = HeadConfig(depth=header["head_depth"])
    model = LoRAT(variant, head_depth=head.depth, initialise=False, device="meta")
    state = _read_weights(folder, MODEL_FILE)
    problems = differences(
        {n: tuple(v.shape) for n, v in model.state_dict().items()},
        {n: tuple(v.shape) for n, v in state.items()},
    )
    if problems:
        raise UserError(f"{folder} does not fit its configuration: {problems}; give another.")
    model.load_state_dict(state, assign=True)
    model.backbone_source = header["backbone"]["source"]
    model.tracking = from_dict(TrackingConfig, header.get("tracking", {}))
    return model.requires_grad_(False).eval()


def save_backbone(
    model: LoRAT,
    file: Path | str,
    *,
    dtype: torch.dtype = torch.float32,
    with_head: bool = False,
) -> None:
    """Write the transformer, adapters folded in, in DINOv2's key layout (safetensors).

    The token types it was trained with go along, and its head if that is asked for; a model built
    on the file starts from them.
    """
    merged = model.merge() if model.lora is not None else model
    write_backbone(
        merged.backbone,
        Path(file),
        ffn=model.variant.ffn,
        dtype=dtype,
        token_type=merged.embedding.token_type,
        head=merged.head.state_dict() if with_head else None,
    )
