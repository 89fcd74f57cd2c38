"""Read and write the layout of the released LoRAT checkpoints.

Released files hold q, k and v as separate layers and their adapters as ``lora.A`` and ``lora.B``;
older ones (``.bin``, which are safetensors) hold the trained tensors alone, so the frozen ones
come from the DINOv2 backbone.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lorat.config.training import LORA_TARGETS, HeadConfig, TrainConfig
from lorat.config.variants import VARIANTS, Variant
from lorat.errors import UserError
from lorat.files.tensors import read_tensors, write_tensors
from lorat.model.backbone import fit_position, read_backbone, source_of
from lorat.model.network import LoRAT, assemble, differences

_LAYER = re.compile(
    r"(?P<block>blocks\.\d+)\.(?:attn\.qkv\.(?P<part>[qkv])|attn\.(?P<proj>proj)|mlp\.(?P<ffn>\w+))"
    r"\.(?P<leaf>lora\.\w+|(?:linear\.)?(?:weight|bias))"
)
_SWIGLU = {"w12": "fc1", "w3": "fc2"}


@dataclass(kw_only=True)
class OfficialWeights:
    """A released checkpoint, sorted by what its tensors are."""

    plain: dict[str, Tensor] = field(default_factory=dict)
    """Everything but adapters; q, k and v under ``blocks.i.attn.q.weight`` and so on."""
    adapters: dict[str, Tensor] = field(default_factory=dict)
    """``blocks.i.attn.q.A`` (rank, in) and ``.B`` (out, rank)."""
    scalars: dict[str, Tensor] = field(default_factory=dict)
    """Alpha and rsLoRA, global ones without a layer: ``alpha``, ``blocks.i.attn.q.alpha``."""
    names: dict[str, str] = field(default_factory=dict)
    """The name in the file of every entry of the dictionaries above."""

    @property
    def rank(self) -> int | None:
        """Rank of the adapters, none if there are none."""
        for name, value in self.adapters.items():
            if name.endswith(".A") and value.ndim == 2:
                return value.shape[0]
        return None

    @property
    def targets(self) -> tuple[str, ...]:
        """The kinds of layer that have an adapter."""
        found = {name.split(".")[3] for name in self.adapters}
        return tuple(t for t in LORA_TARGETS if t in found)

    @property
    def head_depth(self) -> int:
        """Number of linear layers in each MLP of the head, at least 1."""
        layers = [
            int(m[1]) for n in self.plain if (m := re.match(r"head\.\w+\.layers\.(\d+)\.", n))
        ]
        return max(layers, default=0) + 1

    def scaling(self, layer: str) -> float:
        """Return what B A is multiplied with; 1 where the file says nothing."""
        alpha = self.scalars.get(f"{layer}.alpha", self.scalars.get("alpha"))
        rslora = self.scalars.get(f"{layer}.use_rslora", self.scalars.get("use_rslora"))
        if alpha is None:
            return 1.0
        rank = self.adapters[f"{layer}.A"].shape[0]
        return float(alpha) / (math.sqrt(rank) if rslora is not None and bool(rslora) else rank)


def sort_weights(state: Mapping[str, Tensor]) -> OfficialWeights:
    """Sort a released state dict; unknown names end up in ``plain`` as they are."""
    weights = OfficialWeights()

    def put(room: dict[str, Tensor], name: str, value: Tensor, source: str) -> None:
        room[name] = value
        weights.names[name] = source

    for source, value in state.items():
        if source in {"lora_alpha", "use_rslora"}:
            put(weights.scalars, source.removeprefix("lora_"), value, source)
        elif match := _LAYER.fullmatch(source):
            kind = match["part"] or match["proj"] or match["ffn"]
            room = "mlp" if match["ffn"] else "attn"
            layer = f"{match['block']}.{room}.{_SWIGLU.get(kind, kind)}"
            group, _, leaf = match["leaf"].rpartition(".")
            if group != "lora":
                put(weights.plain, f"{layer}.{leaf}", value, source)
            elif leaf in {"A", "B"}:
                put(weights.adapters, f"{layer}.{leaf}", value, source)
            else:
                put(weights.scalars, f"{layer}.{leaf}", value, source)
        elif re.fullmatch(r"blocks\.\d+\.attn\.qkv\.(weight|bias)", source) and (
            value.shape[0] % 3 == 0
        ):
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                put(weights.plain, source.replace(".qkv.", f".{part}."), rows, source)
        else:
            put(weights.plain, source, value, source)
    return weights


def import_official(
    source: Path | str | Mapping[str, Tensor],
    variant: Variant,
    *,
    backbone: str = "auto",
) -> LoRAT:
    """Build a model from a released checkpoint.

    Rank, targets and head depth are read off the tensors.  A file without an alpha was trained
    with alpha 1; as in the published merge, LoRA is then scaled by 1.

    Args:
        source: a file (``.bin`` and ``.safetensors`` are safetensors) or its tensors.
        variant: the sizes of the model, which a file does not say completely.
        backbone: where frozen weights that the file lacks come from; as in the configuration.

    Raises:
        UserError: with every missing, unexpected and misshapen tensor at once.
    """
    state = source if isinstance(source, Mapping) else read_tensors(Path(source))
    weights = sort_weights(state)
    config = _configuration(weights, variant, backbone)
    model = _skeleton(config, variant)
    expected = _expected_shapes(model)
    frozen = {n for n in expected if not n.startswith(("head.", "token_type_embed"))}
    frozen -= weights.adapters.keys() | {n for n in expected if n.endswith((".A", ".B"))}

    given = weights.plain | weights.adapters
    absent = frozen - given.keys()
    origin = source_of(backbone, variant) if absent else "none"
    problems = _problems(expected, given, weights.names, ignore=absent)
    if not problems and absent and origin != "none":
        base = sort_weights(fit_position(read_backbone(origin, variant), variant.search_grid))
        weights.names |= {n: f"{origin}: {n}" for n in base.plain if n not in given}
        given = base.plain | given
        absent = set()
    problems = _problems(expected, given, weights.names, ignore=set())
    if problems:
        hint = "give backbone=hub or backbone=FILE for the frozen ones" if absent else "give those"
        raise UserError(
            f"The checkpoint does not fit LoRAT {variant.name}: {problems}; {hint} of this variant."
        )
    return _fill(config, variant, weights, given, origin)


def _configuration(weights: OfficialWeights, variant: Variant, backbone: str) -> TrainConfig:
    config = TrainConfig(backbone=backbone)
    changes: dict[str, object] = {"head": HeadConfig(depth=weights.head_depth)}
    if variant.name in VARIANTS:
        changes["variant"] = variant.name
    rank = weights.rank
    if rank is None:
        return dataclasses.replace(config, adaptation="full", **changes)  # type: ignore[arg-type]
    rslora = bool(weights.scalars.get("use_rslora", torch.tensor(False)))
    alpha = float(weights.scalars["alpha"]) if "alpha" in weights.scalars else float(rank)
    lora = dataclasses.replace(
        config.lora,
        rank=rank,
        alpha=alpha,
        rslora=rslora and "alpha" in weights.scalars,
        targets=weights.targets or LORA_TARGETS,
    )
    return dataclasses.replace(config, adaptation="lora", lora=lora, **changes)  # type: ignore[arg-type]


def _skeleton(config: TrainConfig, variant: Variant) -> LoRAT:
    model = LoRAT(variant, head_depth=config.head.depth, initialise=False, device="meta")
    model.adapt(config.adaptation, config.lora)
    return model


def _expected_shapes(model: LoRAT) -> dict[str, tuple[int, ...]]:
    """Return the shapes under the names of :class:`OfficialWeights`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, value in official_state(model, scalars=False).items():
        sorted_one = sort_weights({name: value})
        for key, part in (sorted_one.plain | sorted_one.adapters).items():
            shapes[key] = tuple(part.shape)
    return shapes


def _problems(
    expected: dict[str, tuple[int, ...]],
    given: Mapping[str, Tensor],
    names: dict[str, str],
    *,
    ignore: set[str],
) -> str | None:
    swiglu = any(".w12." in source for source in names.values())

    def official_name(name: str) -> str:
        if name in names:
            return names[name]
        name = re.sub(r"\.attn\.([qkv])\.", r".attn.qkv.\1.", name)
        name = re.sub(r"\.([AB])$", r".lora.\1", name)
        if swiglu:
            name = name.replace(".mlp.fc1.", ".mlp.w12.").replace(".mlp.fc2.", ".mlp.w3.")
        return name

    return differences(
        {official_name(n): s for n, s in expected.items() if n not in ignore},
        {official_name(n): tuple(v.shape) for n, v in given.items()},
    )


def _fill(
    config: TrainConfig,
    variant: Variant,
    weights: OfficialWeights,
    given: Mapping[str, Tensor],
    origin: str,
) -> LoRAT:
    backbone: dict[str, Tensor] = {}
    for name, value in given.items():
        if re.search(r"\.attn\.[qkv]\.(weight|bias)$", name):
            if ".attn.q." in name:
                rows = [given[name.replace(".attn.q.", f".attn.{p}.")] for p in "qkv"]
                backbone[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat(rows)
        elif not name.startswith(("head.", "token_type_embed")) and name not in weights.adapters:
            backbone[name] = value
    model = assemble(config, variant, backbone, source=origin)
    with torch.no_grad():
        model.embedding.token_type.copy_(given["token_type_embed"])
        for name, parameter in model.head.named_parameters():
            parameter.copy_(given[f"head.{name}"])
        if weights.adapters:
            from lorat.model.adapter import ADAPTER, adapted_layers, matrices

            for name, layer in adapted_layers(model.backbone):
                a, b = matrices(layer)
                a.copy_(weights.adapters[f"{name}.A"])
                # A layer with an alpha of its own keeps its function under the common scaling.
                ratio = weights.scaling(name) / layer.scaling[ADAPTER]
                b.copy_(weights.adapters[f"{name}.B"] * (1.0 if math.isclose(ratio, 1) else ratio))
    return model


def official_state(model: LoRAT, *, scalars: bool = True) -> dict[str, Tensor]:
    """Return the weights in the released layout: unmerged, or merged for a deployable model.

    Args:
        model: any model.
        scalars: write ``lora_alpha`` and ``use_rslora``.
    """
    state: dict[str, Tensor] = {}
    swiglu = model.variant.ffn == "swiglu"
    lora = model.lora
    for name, value in model.state_dict().items():
        value = value.detach()
        is_backbone = name.startswith("backbone.")
        is_adapter = ".lora_" in name
        name = name.removeprefix("backbone.")
        name = name.replace("embedding.token_type", "token_type_embed")
        if swiglu and is_backbone:
            name = name.replace(".mlp.fc1.", ".mlp.w12.").replace(".mlp.fc2.", ".mlp.w3.")
        name = re.sub(r"\.attn\.([qkv])\.", r".attn.qkv.\1.", name)
        name = re.sub(r"\.lora_([AB])\.\w+\.weight$", r".lora.\1", name)
        name = name.replace(".base_layer.", ".linear.")
        if (
            lora is not None
            and set(lora.targets) & set("qkv")
            and ".attn.qkv." in name
            and (not is_adapter)
        ):
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                kind = f"{part}.linear" if part in lora.targets else part
                state[name.replace(".qkv.", f".qkv.{kind}.")] = rows
        else:
            state[name] = value
    if scalars and lora is not None:
        state["lora_alpha"] = torch.tensor(lora.resolved_alpha)
        state["use_rslora"] = torch.tensor(lora.rslora)
    return state


def export_official(model: LoRAT, path: Path | str) -> None:
    """Write the released layout (safetensors, whatever the name)."""
    state = official_state(model)
    write_tensors({k: v.clone() for k, v in state.items()}, Path(path))  # none shares memory
