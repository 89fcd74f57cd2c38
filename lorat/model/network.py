"""LoRAT: a DINOv2 transformer over template and search tokens, adapters, and a head.

B batch, N tokens, D width, H W map rows and columns, h w template grid.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorat.config.tracking import TrackingConfig
from lorat.config.training import Adaptation, LoraConfig, TrainConfig
from lorat.config.variants import Variant
from lorat.errors import UserError
from lorat.model.backbone import (
    HEAD_PREFIX,
    TOKEN_TYPE_KEY,
    build_backbone,
    fit_position,
    initialise_from_scratch,
    plain_weights,
    read_backbone,
    source_of,
    store_frozen,
)
from lorat.model.embedding import TokenEmbedding
from lorat.model.head import Head

FROM_SCRATCH_LAYER_SCALE = 1.0
"""LayerScale of a backbone without pretrained weights; DINOv2's 1e-5 would mute frozen blocks."""


class LoRAT(nn.Module):
    """The tracker's network."""

    def __init__(
        self,
        variant: Variant,
        *,
        head_depth: int = 3,
        drop_path: float = 0.0,
        layer_scale: float = 1e-5,
        initialise: bool = True,
        activation_checkpointing: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.variant = variant
        self.head_depth = head_depth
        self.activation_checkpointing = activation_checkpointing
        self.adaptation: Adaptation | None = None
        """What is trained; none for a deployable model, which has no adapters."""
        self.lora: LoraConfig | None = None
        """The adapters' configuration; none if there are none."""
        self.backbone_source = "none"
        """Where the frozen weights came from: hub, shipped, none or a file."""
        self.config: TrainConfig | None = None
        """What the model was built from; none for a deployable model."""
        self.tracking = TrackingConfig()
        """How to track with it."""
        self.backbone = build_backbone(
            variant,
            drop_path=drop_path,
            layer_scale=layer_scale,
            initialise=initialise,
            device=device,
        )
        self.embedding = TokenEmbedding(variant.dim, init_std=variant.init_std, device=device)
        self.head = Head(variant.dim, head_depth, init_std=variant.init_std, device=device)

    def patch_tokens(self, image_BCHW: Tensor) -> Tensor:
        """Embed an image's patches, row-major: (B, 3, 14·h, 14·w) -> (B, h·w, D)."""
        projection: Any = self.backbone.patch_embed.proj
        side = self.variant.patch_size
        # One product of the patches laid out in rows, where a convolution takes several times
        # as long on a GPU.
        patch_BChpwp = image_BCHW.unflatten(3, (-1, side)).unflatten(2, (-1, side))
        patch_BND = patch_BChpwp.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return F.linear(patch_BND, projection.weight.flatten(1), projection.bias)

    def tokens(self, template_BCHW: Tensor, search_BCHW: Tensor, mask_Bhw: Tensor) -> Tensor:
        """Return what enters the first block: template tokens, then search tokens."""
        return self.embedding(
            self.patch_tokens(template_BCHW),
            self.patch_tokens(search_BCHW),
            self.backbone.pos_embed,
            mask_Bhw,
        )

    def forward(
        self, template_BCHW: Tensor, search_BCHW: Tensor, foreground_mask_Bhw: Tensor
    ) -> dict[str, Tensor]:
        """Locate the template's target in the search crop.

        Args:
            template_BCHW: ImageNet-normalised RGB template crop.
            search_BCHW: ImageNet-normalised RGB search crop.
            foreground_mask_Bhw: int64, 1 where a template cell belongs to the target, else 0.

        Returns:
            ``score_map`` (B, H, W) float32 logits and ``boxes`` (B, H, W, 4) float32 xyxy as
            fractions of the search crop.
        """
        x_BND = self.tokens(template_BCHW, search_BCHW, foreground_mask_Bhw)
        for block in self.backbone.blocks:
            if self.activation_checkpointing and self.training and torch.is_grad_enabled():
                x_BND = checkpoint(block, x_BND, use_reentrant=False)
            else:
                x_BND = block(x_BND)
        num_template = foreground_mask_Bhw.shape[-2] * foreground_mask_Bhw.shape[-1]
        # LayerNorm works on each token, so the template's need not be normalised.
        return self.head(self.backbone.norm(x_BND[:, num_template:]))

    def compile(self, **options: Any) -> None:
        """Let the blocks be compiled at their first pass, which are nearly all of the work.

        They are alike: one is compiled and all use its code, which takes a fraction of the time
        that the network as a whole takes.

        Args:
            options: of :func:`torch.compile`.
        """
        for block in self.backbone.blocks:
            block.compile(**options)

    def uncompile(self) -> None:
        """Let the blocks run as they are again."""
        for block in self.backbone.blocks:
            block._compiled_call_impl = None

    def adapt(self, adaptation: Adaptation, lora: LoraConfig | None = None) -> None:
        """Choose what is trained: adapters and embeddings and head, everything, or the head.

        Args:
            adaptation: ``lora`` also adds the adapters, with weights from the global generator.
            lora: their configuration.
        """
        self.adaptation = adaptation
        self.requires_grad_(adaptation == "full")
        self.head.requires_grad_(True)
        if adaptation == "lora":
            from lorat.model.adapter import adapted_layers, add_lora

            self.lora = lora or LoraConfig()
            self.embedding.requires_grad_(True)
            add_lora(self.backbone, self.lora)
            self.backbone.requires_grad_(False)
            for _, layer in adapted_layers(self.backbone):
                layer.lora_A.requires_grad_(True)
                layer.lora_B.requires_grad_(True)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that training changes, in a fixed order."""
        return [p for p in self.parameters() if p.requires_grad]

    def plain_state(self) -> dict[str, Tensor]:
        """Return the weights of the deployable model: adapters folded in, no peft names.

        Where nothing is folded the tensors are the model's own.
        """
        backbone = plain_weights(self.backbone)
        if self.lora is not None:
            from lorat.model.adapter import merged_weights

            backbone |= merged_weights(self.backbone)
        state = {f"backbone.{name}": value for name, value in backbone.items()}
        state |= {f"embedding.{name}": v for name, v in self.embedding.state_dict().items()}
        state |= {f"head.{name}": v for name, v in self.head.state_dict().items()}
        return state

    def merge(self) -> LoRAT:
        """Return a new deployable model, in eval mode, with the adapters folded in."""
        merged = LoRAT(self.variant, head_depth=self.head_depth, initialise=False, device="meta")
        dtype = self.embedding.token_type.dtype
        state = {k: v.detach().to(dtype, copy=True) for k, v in self.plain_state().items()}
        merged.load_state_dict(state, assign=True)
        merged.backbone_source = self.backbone_source
        merged.tracking = self.tracking
        return merged.requires_grad_(False).eval()


def build_model(config: TrainConfig, *, variant: Variant | None = None) -> LoRAT:
    """Build the model that ``config`` describes, on the CPU, in train mode.

    Args:
        config: adapters, head, drop path, backbone weights and how to track; ``seed`` draws what
            is random (the global generator is left as it was).
        variant: sizes, instead of those that ``config.variant`` names.

    Raises:
        UserError: if the backbone cannot be read or does not fit, with every key that differs.
    """
    variant = variant or config.model_variant
    source = source_of(config.backbone, variant)
    weights = None if source == "none" else read_backbone(source, variant)
    return assemble(config, variant, weights, source=source)


def assemble(
    config: TrainConfig,
    variant: Variant,
    weights: dict[str, Tensor] | None,
    *,
    source: str,
) -> LoRAT:
    """Build the model around backbone weights that are already read; none means random.

    Args:
        config: as for :func:`build_model`, apart from ``variant`` and ``backbone``.
        variant: sizes.
        weights: the backbone's, under timm's keys, with a position grid of any size; token types
            too if it was pretrained by tracking, and the head, which is used if its depth is the
            configuration's.
        source: where they came from, kept as ``model.backbone_source``.

    Raises:
        UserError: if the weights do not fit, with every key that differs.
    """
    drop_path = variant.drop_path if config.drop_path is None else config.drop_path
    fitted = {} if weights is None else dict(fit_position(weights, variant.search_grid))
    token_type = fitted.pop(TOKEN_TYPE_KEY, None)
    names = [name for name in fitted if name.startswith(HEAD_PREFIX)]
    head = {name.removeprefix(HEAD_PREFIX): fitted.pop(name) for name in names}
    what = f"the backbone of {variant.name}"
    if weights is not None:  # before anything is made of a size that a file only claims to have
        plan = build_backbone(variant, initialise=False, device="meta")
        check_weights(plan, fitted, what=what)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = LoRAT(
            variant,
            head_depth=config.head.depth,
            drop_path=drop_path,
            layer_scale=FROM_SCRATCH_LAYER_SCALE,
            initialise=weights is None,
            activation_checkpointing=config.activation_checkpointing,
        )
        if weights is None:
            initialise_from_scratch(model.backbone)
        else:
            load_weights(model.backbone, fitted, what=what)
            if token_type is not None:
                load_weights(
                    model.embedding, {"token_type": token_type}, what=f"the types of {variant.name}"
                )
            if len(head) == len(model.head.state_dict()):
                load_weights(model.head, head, what=f"the head of {variant.name}")
        model.adapt(config.adaptation, config.lora)
    model.backbone_source = source
    model.config = config
    model.tracking = config.tracking
    if config.frozen_dtype == "bf16":
        store_frozen(model.backbone, torch.bfloat16)
    return model.train()


def load_weights(module: nn.Module, weights: dict[str, Tensor], *, what: str) -> None:
    """Copy weights into a module, which must have exactly these.

    Raises:
        UserError: as :func:`check_weights`.
    """
    check_weights(module, weights, what=what)
    module.load_state_dict(weights)


def check_weights(module: nn.Module, weights: dict[str, Tensor], *, what: str) -> None:
    """Compare weights with those that a module, which may be on ``meta``, has.

    Raises:
        UserError: with all missing, unexpected and misshapen names at once.
    """
    own = module.state_dict()
    problems = differences(
        {name: tuple(value.shape) for name, value in own.items()},
        {name: tuple(value.shape) for name, value in weights.items()},
    )
    if problems:
        raise UserError(f"The weights do not fit {what}: {problems}; give those of this variant.")


def differences(
    expected: dict[str, tuple[int, ...]], given: dict[str, tuple[int, ...]]
) -> str | None:
    """Describe every missing, unexpected and misshapen name, none if there is none."""
    missing = sorted(expected.keys() - given.keys())
    unexpected = sorted(given.keys() - expected.keys())
    misshapen = sorted(k for k in expected.keys() & given.keys() if expected[k] != given[k])
    parts = []
    if missing:
        parts.append(f"missing {', '.join(missing)}")
    if unexpected:
        parts.append(f"unexpected {', '.join(unexpected)}")
    if misshapen:
        shapes = (f"{k} {list(given[k])} instead of {list(expected[k])}" for k in misshapen)
        parts.append(f"misshapen {', '.join(shapes)}")
    return "; ".join(parts) or None
