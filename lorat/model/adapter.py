"""LoRA adapters on the linear layers of every block, through peft.

timm keeps q, k and v in one linear layer.  Each gets its own adapter here (the paper counts ranks
that way) while the frozen product stays fused: the base layer of such an adapter is a slice that
owns no weights, and :class:`lorat.model.backbone.Attention` folds the adapter into its third of the
fused product (:mod:`lorat.model.folded`).  So LoRA on q, k and v costs one product over the tokens.

On disk the adapters of q, k and v are one of the fused layer (n of rank r are one of rank n r: the
rows of A stacked, B block-diagonal; exact), so that peft opens the file on a plain timm model.
Adapters of q, k and v would load there in part, without a word: timm has no such layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from peft.tuners.lora import Linear as PeftLinear
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lorat.config.training import LoraConfig
from lorat.errors import UserError
from lorat.model.folded import foldable, folded_linear, parts_of

ADAPTER = "default"
"""peft's name of the only adapter."""

INIT_STD = 0.02


class FoldedLinear(PeftLinear):
    """peft's adapted linear layer, computed with its adapters folded in where it can be."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the layer: (..., in) -> (..., out)."""
        if args or kwargs or not foldable(self):
            y: Tensor = super().forward(x, *args, **kwargs)
            return y
        base: Any = self.get_base_layer()
        return folded_linear(x, base.weight, base.bias, parts_of(self))


class LinearSlice(nn.Linear):
    """A third of a fused q|k|v layer: a linear layer whose weights are views, not its own."""

    def __init__(self, fused: nn.Linear, index: int) -> None:
        nn.Module.__init__(self)
        self.in_features = fused.in_features
        self.out_features = fused.out_features // 3
        self._rows = slice(index * self.out_features, (index + 1) * self.out_features)
        # In a tuple, so that the fused layer is not registered a second time.
        self._fused = (fused,)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The rows of the fused weight, (out, in)."""
        return self._fused[0].weight[self._rows]

    @property
    def bias(self) -> Tensor:  # type: ignore[override]
        """The rows of the fused bias, (out,)."""
        return self._fused[0].bias[self._rows]


def peft_config(lora: LoraConfig) -> PeftLoraConfig:
    """Return peft's form of a LoRA configuration, for a backbone with separate q, k and v."""
    return _peft_config(lora, lora.targets)


def fused_peft_config(lora: LoraConfig) -> PeftLoraConfig:
    """Return peft's form for a plain timm model, as ``adapter_config.json`` keeps it."""
    parts = _fused_parts(lora)
    targets = tuple(t for t in lora.targets if t not in parts)
    config = _peft_config(lora, (*targets, "qkv") if parts else targets)
    if parts:
        # The scaling, alpha over the rank or its root, has to stay that of one part.
        growth = math.sqrt(len(parts)) if lora.rslora else len(parts)
        config.rank_pattern = {"attn.qkv": lora.rank * len(parts)}
        config.alpha_pattern = {"attn.qkv": lora.resolved_alpha * growth}
    config.inference_mode = True
    return config


def _fused_parts(lora: LoraConfig) -> tuple[str, ...]:
    return tuple(name for name in "qkv" if name in lora.targets)


def _peft_config(lora: LoraConfig, targets: tuple[str, ...]) -> PeftLoraConfig:
    attention = "|".join(t for t in targets if t not in {"fc1", "fc2"})
    ffn = "|".join(t for t in targets if t in {"fc1", "fc2"})
    parts = [
        f"{room}\\.(?:{names})" for room, names in (("attn", attention), ("mlp", ffn)) if names
    ]
    alpha = lora.resolved_alpha
    return PeftLoraConfig(
        r=lora.rank,
        lora_alpha=int(alpha) if alpha.is_integer() else alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        # A bare "proj" would also match the patch embedding's.
        target_modules=rf"(?:.*\.)?blocks\.\d+\.(?:{'|'.join(parts)})",
        bias="none",
    )


def attach_slices(backbone: VisionTransformer) -> None:
    """Give every attention layer the modules ``q``, ``k``, ``v`` that peft can adapt."""
    for block in backbone.blocks:
        attention: Any = block.attn
        for index, name in enumerate("qkv"):
            setattr(attention, name, LinearSlice(attention.qkv, index))


def add_lora(backbone: VisionTransformer, lora: LoraConfig) -> None:
    """Adapt the blocks in place and draw the adapters' weights from the global generator.

    Slices that get no adapter are taken away again.
    """
    attach_slices(backbone)
    device = next(backbone.parameters()).device
    # peft would make the adapters on the CPU first, also those of a model without storage.
    with device:
        inject_adapter_in_model(peft_config(lora), backbone, adapter_name=ADAPTER)
    for block in backbone.blocks:
        for name in "qkv":
            if not isinstance(getattr(block.attn, name), PeftLinear):
                delattr(block.attn, name)
    for _, layer in adapted_layers(backbone):
        layer.__class__ = FoldedLinear
        initialise(*matrices(layer), lora)


def initialise(a_Rin: Tensor, b_outR: Tensor, lora: LoraConfig) -> None:
    """Draw A and B: both truncated normal (the paper's), or A Kaiming / Gaussian and B zero."""
    if lora.init == "truncated_normal":
        nn.init.trunc_normal_(a_Rin, std=INIT_STD)
        nn.init.trunc_normal_(b_outR, std=INIT_STD)
        return
    if lora.init == "kaiming":
        nn.init.kaiming_uniform_(a_Rin, a=math.sqrt(5))
    else:
        nn.init.normal_(a_Rin, std=1 / lora.rank)
    nn.init.zeros_(b_outR)


def adapted_layers(backbone: nn.Module) -> Iterator[tuple[str, PeftLinear]]:
    """Yield name and layer of everything that has an adapter, such as ``blocks.0.attn.q``."""
    for name, module in backbone.named_modules():
        if isinstance(module, PeftLinear):
            yield name, module


def matrices(layer: PeftLinear) -> tuple[Tensor, Tensor]:
    """Return A (rank, in) and B (out, rank) of an adapted layer."""
    a: Any = layer.lora_A[ADAPTER]
    b: Any = layer.lora_B[ADAPTER]
    return a.weight, b.weight


def merged_weights(backbone: VisionTransformer) -> dict[str, Tensor]:
    """Return the adapted weights with the adapters folded in, under their timm names.

    W + scaling · B A, computed in float32 and rounded once to the weight's dtype; q, k and v are
    folded into their rows of the fused weight.
    """
    merged: dict[str, Tensor] = {}
    for name, layer in adapted_layers(backbone):
        a, b = matrices(layer)
        delta = layer.scaling[ADAPTER] * (b.detach().float() @ a.detach().float())
        base: Any = layer.get_base_layer()
        if isinstance(base, LinearSlice):
            fused = name.rpartition(".")[0] + ".qkv.weight"
            if fused not in merged:
                merged[fused] = base._fused[0].weight.detach().float().clone()
            merged[fused][base._rows] += delta
        else:
            merged[f"{name}.weight"] = base.weight.detach().float() + delta
    dtypes = {n: p.dtype for n, p in backbone.named_parameters()}
    return {
        name: value.to(dtypes.get(name, dtypes.get(name.replace(".weight", ".base_layer.weight"))))
        for name, value in merged.items()
    }


def adapter_weights(backbone: VisionTransformer) -> dict[str, Tensor]:
    """Return A and B under the names of peft's ``adapter_model.safetensors`` for plain timm."""
    weights: dict[str, Tensor] = {}
    fused: dict[str, list[PeftLinear]] = {}
    for name, layer in adapted_layers(backbone):
        if isinstance(layer.get_base_layer(), LinearSlice):
            fused.setdefault(name.rpartition(".")[0], []).append(layer)
            continue
        a, b = matrices(layer)
        weights |= {_peft_name(name, "A"): a.detach(), _peft_name(name, "B"): b.detach()}
    for attention, layers in fused.items():
        pairs = [matrices(layer) for layer in layers]
        rank, dim = pairs[0][0].shape[0], pairs[0][1].shape[0]
        b_outR = pairs[0][1].new_zeros(3 * dim, rank * len(pairs))
        for place, (layer, (_, b)) in enumerate(zip(layers, pairs, strict=True)):
            base: Any = layer.get_base_layer()
            b_outR[base._rows, place * rank : (place + 1) * rank] = b.detach()
        name = f"{attention}.qkv"
        weights[_peft_name(name, "A")] = torch.cat([a.detach() for a, _ in pairs])
        weights[_peft_name(name, "B")] = b_outR
    return weights


def _peft_name(layer: str, matrix: str) -> str:
    return f"base_model.model.{layer}.lora_{matrix}.weight"


def own_adapter_weights(weights: Mapping[str, Tensor], lora: LoraConfig) -> dict[str, Tensor]:
    """Return what :func:`adapter_weights` gave under the names of the backbone's own adapters.

    A matrix of a fused layer that has not the shape of its parts keeps its name.

    Raises:
        UserError: if q, k and v of a fused layer share a rank, so that they cannot be told apart.
    """
    parts, rank = _fused_parts(lora), lora.rank
    own: dict[str, Tensor] = {}
    for name, value in weights.items():
        stem, _, leaf = name.removeprefix("base_model.model.").rpartition(".")
        layer, _, matrix = stem.rpartition(".")
        ranks = value.shape[0 if matrix == "lora_A" else -1]
        if not layer.endswith(".qkv") or value.ndim != 2 or ranks != len(parts) * rank:
            own[f"{stem}.{ADAPTER}.{leaf}"] = value
            continue
        kept = torch.zeros_like(value)
        for place, part in enumerate(parts):
            columns = slice(place * rank, (place + 1) * rank)
            dim = value.shape[0] // 3
            rows = slice("qkv".index(part) * dim, ("qkv".index(part) + 1) * dim)
            where = (columns,) if matrix == "lora_A" else (rows, columns)
            kept[where] = value[where]
            stem = f"{layer.removesuffix('qkv')}{part}.{matrix}"
            own[f"{stem}.{ADAPTER}.{leaf}"] = value[where].clone()
        if not torch.equal(kept.nan_to_num(), value.nan_to_num()):
            raise UserError(
                f"The adapter's {name} mixes q, k and v, which are adapted apart here; give an "
                "adapter as it was saved, or fold this one into the weights with peft."
            )
    return own
