"""The DINOv2 vision transformer, built with timm, and its pretrained weights.

B batch, N tokens, D width.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import LayerScale, Mlp, SwiGLUPacked, build_sincos2d_pos_embed
from timm.layers.attention import Attention as TimmAttention
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lorat.config.fields import shown
from lorat.config.variants import VARIANTS, Variant
from lorat.errors import UserError
from lorat.files.tensors import read_tensors, write_tensors
from lorat.model.embedding import resize_position
from lorat.model.folded import foldable, folded_linear, parts_of

logger = logging.getLogger(__name__)

_ASSETS = Path(__file__).parents[1] / "assets"
SHIPPED = {
    "T-112": _ASSETS / "t112_backbone.safetensors",
    "T-168": _ASSETS / "t168_backbone.safetensors",
}
"""Backbones that come with the package, by variant; used by ``auto`` where the file exists."""

TOKEN_TYPE_KEY = "token_type_embed"
"""Key of the token types in the file of a backbone that was pretrained by tracking."""

HEAD_PREFIX = "tracking_head."
"""What the keys of such a tracker's head begin with, where the file has it, too."""

BERNOULLI_UP_TO = 0.1
"""Drop-path rates above this one skip samples of the batch instead of zeroing them (DINOv2)."""


def low_rank_parts(layer: Any, x: Tensor) -> list[Tensor]:
    """Return what each active adapter of a peft LoRA layer adds: ``scaling * B(A(dropout(x)))``.

    Empty for anything else than such a layer, and where adapters are disabled or merged.
    """
    if not hasattr(layer, "lora_A") or layer.disable_adapters or layer.merged:
        return []
    parts = []
    for name in layer.active_adapters:
        if name in layer.lora_A:
            a, b = layer.lora_A[name], layer.lora_B[name]
            x_cast = x.to(a.weight.dtype)
            parts.append(b(a(layer.lora_dropout[name](x_cast))) * layer.scaling[name])
    return parts


class Attention(TimmAttention):
    """timm's attention with room for separate adapters on q, k and v.

    The frozen projection stays one fused product.  :mod:`lorat.model.adapter` may attach ``q``,
    ``k`` and ``v``: peft layers over slices of it, which are folded into it; with dropout only
    their low-rank parts are computed here.
    """

    def forward(
        self, x_BND: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Attend over all tokens, without a mask."""
        B, N, D = x_BND.shape
        parts = list(self._qkv(x_BND).chunk(3, dim=-1))
        for index, name in enumerate("qkv"):
            layer = getattr(self, name, None)
            if not foldable(layer):
                for part in low_rank_parts(layer, x_BND):
                    parts[index] = parts[index] + part
        q, k, v = (p.view(B, N, self.num_heads, D // self.num_heads).transpose(1, 2) for p in parts)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(B, N, D))

    def _qkv(self, x_BND: Tensor) -> Tensor:
        """Apply the fused projection with those adapters that can be folded into it."""
        width = x_BND.shape[-1]
        folded = []
        for index, name in enumerate("qkv"):
            layer = getattr(self, name, None)
            if foldable(layer):
                folded += parts_of(layer, slice(index * width, (index + 1) * width))
        if not folded:
            y: Tensor = self.qkv(x_BND)
            return y
        return folded_linear(x_BND, self.qkv.weight, self.qkv.bias, folded)


class Block(TimmBlock):
    """timm's pre-norm block with DINOv2's two kinds of stochastic depth."""

    drop_path = 0.0
    """Probability that a sample skips a branch while training; the same in all blocks."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Apply the attention and the FFN branch: (B, N, D) -> (B, N, D)."""
        x = self._residual(x, self.norm1, self.attn, self.ls1)
        return self._residual(x, self.norm2, self.mlp, self.ls2)

    def _residual(self, x: Tensor, norm: nn.Module, layer: nn.Module, scale: nn.Module) -> Tensor:
        rate = self.drop_path if self.training else 0.0
        if rate > BERNOULLI_UP_TO:
            batch = x.shape[0]
            num_kept = max(int(batch * (1 - rate)), 1)
            kept = torch.randperm(batch, device=x.device)[:num_kept]
            y = scale(layer(norm(x[kept])))
            return torch.index_add(x, 0, kept, y.to(x.dtype), alpha=batch / num_kept)
        y = layer(norm(x))
        if rate > 0:
            y = scale(y)
            y = y * (y.new_empty((y.shape[0], 1, 1)).bernoulli_(1 - rate) / (1 - rate))
            return x + y
        assert isinstance(scale, LayerScale)
        if y.dtype == x.dtype:
            return torch.addcmul(x, y, scale.gamma)
        # Autocast would make a float32 copy of the branch first, a pass more over the tokens.
        with torch.autocast(x.device.type, enabled=False):
            return torch.addcmul(x, y, scale.gamma)


class StoredLinear(nn.Linear):
    """A frozen linear layer whose weight is stored in fewer bits than it computes in."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply in the dtype of ``x``, or in autocast's."""
        if torch.is_autocast_enabled(x.device.type):
            return F.linear(x, self.weight, self.bias)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


def build_backbone(
    variant: Variant,
    *,
    drop_path: float = 0.0,
    layer_scale: float = 1e-5,
    initialise: bool = True,
    device: torch.device | str | None = None,
) -> VisionTransformer:
    """Build the transformer without class token, its position grid that of the search region.

    Args:
        variant: sizes.
        drop_path: stochastic depth rate of every block, in [0, 1).
        layer_scale: initial LayerScale.
        initialise: draw random weights (from the global generator); no if they are loaded next.
        device: where the weights live; ``meta`` allocates none.
    """
    swiglu = variant.ffn == "swiglu"
    hidden = variant.ffn_hidden * (2 if swiglu else 1)
    backbone = VisionTransformer(
        img_size=variant.search_size,
        patch_size=variant.patch_size,
        num_classes=0,
        global_pool="",
        embed_dim=variant.dim,
        depth=variant.depth,
        num_heads=variant.num_heads,
        # The half keeps int(dim * ratio) at the hidden width whatever the division rounds to.
        mlp_ratio=(hidden + 0.5) / variant.dim,
        qkv_bias=True,
        init_values=layer_scale,
        class_token=False,
        no_embed_class=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        act_layer=nn.SiLU if swiglu else nn.GELU,
        mlp_layer=SwiGLUPacked if swiglu else Mlp,  # type: ignore[arg-type]
        attn_layer=Attention,
        block_fn=Block,
        weight_init="" if initialise else "skip",
        device=device,
    )
    for block in backbone.blocks:
        assert isinstance(block, Block)
        block.drop_path = drop_path
    return backbone


def initialise_from_scratch(backbone: VisionTransformer) -> None:
    """Draw weights that let a transformer without pretraining match template and search early.

    Tokens attend to similar tokens from the first step on (equal query and key projections and
    transposed value and output projections: Trockman and Kolter, "Mimetic Initialization of
    Self-Attention Layers", 2023); positions are fixed sines at half the usual amplitude.  With
    timm's own draw the same training stood still at the loss of a constant box.

    Args:
        backbone: changed in place, with weights from the global generator.
    """
    dim = backbone.embed_dim
    position_1ND: Any = backbone.pos_embed
    grid = math.isqrt(position_1ND.shape[1])
    with torch.no_grad():
        sines = build_sincos2d_pos_embed([grid, grid], dim)
        position_1ND.copy_(0.5 * sines.view(1, grid * grid, dim))
        for block in backbone.blocks:
            assert isinstance(block, Block)
            attention: Any = block.attn
            similar, value = (nn.init.orthogonal_(torch.empty(dim, dim)) for _ in range(2))
            attention.qkv.weight.copy_(torch.cat([similar, similar, value]))
            attention.proj.weight.copy_(0.5 * value.T)
            for module in block.mlp.modules():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight, gain=0.75)


def source_of(setting: str, variant: Variant) -> str:
    """Return what ``backbone = setting`` means for a variant: shipped, hub, none or a path."""
    if setting != "auto":
        return setting
    if variant.timm_name is not None:
        return "hub"
    shipped = SHIPPED.get(variant.name)
    if shipped is None:
        return "none"
    if shipped.exists():
        return "shipped"
    logger.warning("No backbone is shipped for %s; it starts from random weights.", variant.name)
    return "none"


def read_backbone(source: str, variant: Variant) -> dict[str, Tensor]:
    """Read pretrained weights from ``hub``, ``shipped`` or a file, under timm's keys.

    Raises:
        UserError: if the hub cannot be reached or has no such model, or the file cannot be read.
    """
    if source == "hub":
        return adapt_keys(_read_hub(variant))
    if source == "shipped" and variant.name not in SHIPPED:
        raise UserError(
            f"No backbone is shipped for {shown(variant.name)}, only for {', '.join(SHIPPED)}; "
            "give backbone=FILE."
        )
    path = SHIPPED[variant.name] if source == "shipped" else Path(source)
    return adapt_keys(read_tensors(path))


def _read_hub(variant: Variant) -> Mapping[str, Tensor]:
    remedy = "give backbone=FILE (.safetensors or .pth, DINOv2 or timm keys) or backbone=none."
    if variant.timm_name is None:
        raise UserError(f"{variant.name} has no public backbone to fetch from the hub; {remedy}")
    if variant.timm_name not in {known.timm_name for known in VARIANTS.values()}:
        # A header's name could make timm load whatever its author put on the hub or the disk.
        raise UserError(f"{shown(variant.timm_name)} is no backbone of a known variant; {remedy}")
    try:
        return timm.create_model(variant.timm_name, pretrained=True, num_classes=0).state_dict()
    except Exception as error:  # timm and the hub's client raise many unrelated classes
        raise UserError(
            f"The backbone {variant.timm_name} could not be fetched from the hub "
            f"({type(error).__name__}: {error}); connect, or {remedy}"
        ) from error


def adapt_keys(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring DINOv2 or timm keys to those of :func:`build_backbone`.

    Class and mask token and the class row of the position grid are dropped: the tracker has
    patch tokens only.  SwiGLU's ``w12`` and ``w3`` are timm's ``fc1`` and ``fc2``.
    """
    adapted: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name in {"cls_token", "mask_token"}:
            continue
        if (
            name == "pos_embed"
            and value.ndim == 3
            and math.isqrt(value.shape[1]) ** 2 != len(value[0])
        ):
            value = value[:, 1:]
        name = re.sub(r"(\.mlp)\.w12\.", r"\1.fc1.", name)
        adapted[re.sub(r"(\.mlp)\.w3\.", r"\1.fc2.", name)] = value
    return adapted


def fit_position(weights: dict[str, Tensor], grid: int) -> dict[str, Tensor]:
    """Resample the position grid, if there is one that is square, to ``grid`` × ``grid``."""
    position = weights.get("pos_embed")
    if (
        position is None
        or position.ndim != 3
        or math.isqrt(position.shape[1]) ** 2 != len(position[0])
    ):
        return weights
    return weights | {"pos_embed": resize_position(position, grid)}


def store_frozen(backbone: VisionTransformer, dtype: torch.dtype) -> None:
    """Store the frozen linear weights of the blocks in ``dtype``; the rest keeps its own.

    Norms, biases, LayerScale and positions are small and sensitive, so they stay.
    """
    for module in backbone.blocks.modules():
        if type(module) is nn.Linear and not module.weight.requires_grad:
            module.weight.data = module.weight.data.to(dtype)
            module.__class__ = StoredLinear


def plain_weights(backbone: VisionTransformer) -> dict[str, Tensor]:
    """Return the transformer's own weights, without adapters, under their timm names."""
    return {
        name.replace(".base_layer.", "."): value
        for name, value in backbone.state_dict().items()
        if ".lora_" not in name
    }


def fingerprint(backbone: VisionTransformer) -> str:
    """Return a hash that tells backbones apart, of the small tensors alone (quick even for g)."""
    digest = hashlib.sha256()
    for name, value in sorted(plain_weights(backbone).items()):
        if value.ndim == 1:
            digest.update(name.encode())
            digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def write_backbone(
    backbone: VisionTransformer,
    path: Path,
    *,
    ffn: str,
    dtype: torch.dtype = torch.float32,
    token_type: Tensor | None = None,
    head: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the transformer in DINOv2's key layout (safetensors).

    Token types (3, D) and the weights of a head go along if they are given.

    The class token, its position and the mask token, which the tracker does not have, are zeros.
    """
    weights = plain_weights(backbone)
    if token_type is not None:
        weights[TOKEN_TYPE_KEY] = token_type
    weights |= {f"{HEAD_PREFIX}{name}": value for name, value in (head or {}).items()}
    weights = {k: v.detach().cpu().to(dtype).contiguous() for k, v in weights.items()}
    if ffn == "swiglu":
        weights = {
            k.replace(".mlp.fc1.", ".mlp.w12.").replace(".mlp.fc2.", ".mlp.w3."): v
            for k, v in weights.items()
        }
    position = weights["pos_embed"]
    dim = position.shape[-1]
    weights["pos_embed"] = torch.cat([position.new_zeros(1, 1, dim), position], dim=1)
    weights["cls_token"] = position.new_zeros(1, 1, dim)
    weights["mask_token"] = position.new_zeros(1, dim)
    write_tensors(weights, path)
