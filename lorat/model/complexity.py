"""Parameters and multiply-accumulates of a model, without allocating it."""

from __future__ import annotations

from dataclasses import dataclass

from lorat.config.training import TrainConfig
from lorat.config.variants import Variant, get_variant
from lorat.model.network import LoRAT


@dataclass(frozen=True, kw_only=True)
class Description:
    """Sizes of a model; parameters as counts, work as multiply-accumulates of one image pair."""

    variant: Variant
    backbone_params: int
    """DINOv2 as published: with class and mask token and its own position grid."""
    lora_params: int
    head_params: int
    token_type_params: int
    trainable_params: int
    total_training_params: int
    """With adapters, as trained."""
    total_inference_params: int
    """Merged, as deployed."""
    macs: int
    """One forward pass of the merged model."""
    lora_macs: int
    """What unmerged adapters add to a forward pass."""
    train_flops: int
    """Floating-point operations of one training step on one pair: forward, gradients of
    activations, gradients of trained weights (2 per multiply-accumulate; recomputation by
    activation checkpointing does not count)."""

    @property
    def text(self) -> str:
        """A table for people."""
        v = self.variant
        rows = [
            ("dim / depth / heads / FFN", f"{v.dim} / {v.depth} / {v.num_heads} / {v.ffn}"),
            ("template crop / tokens", f"{v.template_size} px / {v.template_grid**2}"),
            ("search crop / tokens", f"{v.search_size} px / {v.search_grid**2}"),
            ("response map", f"{v.search_grid} x {v.search_grid}"),
            ("backbone parameters (DINOv2)", f"{self.backbone_params:,}"),
            ("LoRA parameters", f"{self.lora_params:,}"),
            ("head parameters", f"{self.head_params:,}"),
            ("token type parameters", f"{self.token_type_params:,}"),
            ("trainable parameters", f"{self.trainable_params:,}"),
            ("total while training", f"{self.total_training_params:,}"),
            ("total at inference (merged)", f"{self.total_inference_params:,}"),
            ("GMACs, merged", f"{self.macs / 1e9:,.2f}"),
            ("GMACs of unmerged adapters", f"{self.lora_macs / 1e9:,.2f}"),
            ("training GFLOPs per pair", f"{self.train_flops / 1e9:,.1f}"),
        ]
        width = max(len(label) for label, _ in rows)
        return "\n".join([v.name, *(f"  {label:<{width}}  {value}" for label, value in rows)])


def describe(variant: Variant | str, config: TrainConfig | None = None) -> Description:
    """Count parameters and work of a variant under a configuration; none means its defaults.

    The weights are never allocated.
    """
    if isinstance(variant, str):
        variant = get_variant(variant)
    config = config or TrainConfig()
    model = LoRAT(variant, head_depth=config.head.depth, initialise=False, device="meta")
    model.adapt(config.adaptation, config.lora)

    named = dict(model.named_parameters())
    total = sum(p.numel() for p in named.values())
    lora = sum(p.numel() for n, p in named.items() if ".lora_" in n)
    head = sum(p.numel() for p in model.head.parameters())
    token_type = model.embedding.token_type.numel()
    dim, grid = variant.dim, variant.pretrain_grid
    position = (grid**2 + 1 - variant.search_grid**2) * dim
    # An adapter multiplies every token with both of its matrices.
    lora_macs = (variant.template_grid**2 + variant.search_grid**2) * lora
    macs = merged_macs(variant, head_depth=config.head.depth)
    return Description(
        variant=variant,
        backbone_params=total - lora - head - token_type + position + 2 * dim,
        lora_params=lora,
        head_params=head,
        token_type_params=token_type,
        trainable_params=sum(p.numel() for p in model.trainable_parameters()),
        total_training_params=total,
        total_inference_params=sum(v.numel() for v in model.plain_state().values()),
        macs=sum(macs.values()),
        lora_macs=lora_macs,
        train_flops=_train_flops(config, macs, lora_macs),
    )


def merged_macs(variant: Variant, *, head_depth: int = 3) -> dict[str, int]:
    """Return the multiply-accumulates of one pair by part: patches, blocks, head.

    Matrix products alone, attention as 2 N² D (fvcore's convention, as in the paper's table).
    """
    dim = variant.dim
    num_search = variant.search_grid**2
    num_tokens = variant.template_grid**2 + num_search
    ffn = (3 if variant.ffn == "swiglu" else 2) * variant.ffn_hidden * dim
    first_weights = 2 * dim**2 if head_depth > 1 else 5 * dim
    head_weights = 2 * (head_depth - 1) * dim**2 + 5 * dim
    return {
        "patches": 3 * variant.patch_size**2 * num_tokens * dim,
        "linear": variant.depth * num_tokens * (4 * dim**2 + ffn),
        "attention": variant.depth * 2 * num_tokens**2 * dim,
        "head_first": num_search * first_weights,
        "head_rest": num_search * (head_weights - first_weights),
    }


def _train_flops(config: TrainConfig, macs: dict[str, int], lora_macs: int) -> int:
    forward = sum(macs.values())
    head = macs["head_first"] + macs["head_rest"]
    if config.adaptation == "head":
        # No gradient leaves the head, so its first layers need none of their inputs.
        return 2 * (forward + head + macs["head_rest"])
    # Both factors of an attention product are activations.
    activations = macs["linear"] + 2 * macs["attention"] + head
    if config.adaptation == "full":
        return 2 * (forward + activations + macs["linear"] + macs["patches"] + head)
    # Folded into the weights, adapters cost u = x A', v = dy B and two gradients; with dropout they
    # have three products with each of their matrices.  Folding itself is per step, not per pair.
    lora_products = 2 if config.lora.dropout == 0 else 3
    return 2 * (forward + activations + lora_products * lora_macs + head)
