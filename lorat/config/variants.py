"""The table of model variants: DINOv2 size × crop size."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

from lorat.config.bounds import Bounds, ShareBelowOne, check_bounds
from lorat.errors import UserError

Side = Annotated[int, Bounds(1, 2048)]
AreaFactor = Annotated[float, Bounds(1, 100)]
MAX_GRID = 128
"""Patches along the side of the search crop; L-378 has 27."""
MAX_PARAMETERS = 5_000_000_000
"""Weights of the transformer's blocks; the largest published one has 1.1 billion."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row: everything that fixes the shapes of a LoRAT model."""

    name: str
    timm_name: str | None
    """Name of the pretrained backbone in timm; none if it has no public weights."""
    dim: Annotated[int, Bounds(1, 8192)]
    """Width of a token, 1 to 8192; a multiple of ``num_heads``."""
    depth: Annotated[int, Bounds(1, 256)]
    """Blocks, 1 to 256."""
    num_heads: Annotated[int, Bounds(1, 256)]
    """Attention heads, 1 to 256."""
    ffn: Literal["mlp", "swiglu"] = "mlp"
    pretrain_grid: Annotated[int, Bounds(1, 256)] = 37
    """Side of the position grid that the backbone was pretrained with, 1 to 256 patches."""
    template_size: Side
    """Side of the template crop, 1 to 2048 pixels; a multiple of ``patch_size``."""
    search_size: Side
    """Side of the search crop, 1 to 2048 pixels; a multiple of ``patch_size``."""
    template_area_factor: AreaFactor = 2.0
    """How much context the template crop shows, 1 to 100; 1 is none."""
    search_area_factor: AreaFactor
    """The same of the search crop, 1 to 100."""
    drop_path: ShareBelowOne = 0.0
    """Stochastic depth of a training, 0 or more, below 1."""
    init_std: Annotated[float, Bounds(0, 10)] = 0.02
    """Standard deviation of the head's and the token types' first weights, 0 to 10.

    0.02 as published.  At widths far below 384 it would shrink the signal tenfold per head layer
    and training would stand still for thousands of steps, so the CPU variants use 1 / sqrt(dim).
    """
    recipe: Literal["paper", "small", "brief"] = "paper"
    """Default recipe of :data:`lorat.config.training.RECIPES`."""
    patch_size: Annotated[int, Bounds(1, 256)] = 14
    """Side of a token's patch, 1 to 256 pixels."""

    def __post_init__(self) -> None:
        check_bounds(self, "variant.{}".format)
        problem = None
        if self.dim % self.num_heads:
            problem = f"dim {self.dim} is no multiple of num_heads {self.num_heads}"
        for name in ("template_size", "search_size"):
            if getattr(self, name) % self.patch_size:
                problem = (
                    f"{name} {getattr(self, name)} is no multiple of patch_size {self.patch_size}"
                )
        if self.search_grid > MAX_GRID:
            problem = f"search_size {self.search_size} has more than {MAX_GRID} patches in a row"
        if 12 * self.dim**2 * self.depth > MAX_PARAMETERS:
            problem = f"dim {self.dim} and depth {self.depth} make more than 5 billion weights"
        if problem:
            raise UserError(
                f"The variant cannot be: {problem}; give the sizes of one such as "
                "S-224, dim 384, depth 12, num_heads 6."
            )

    @property
    def template_grid(self) -> int:
        """Side of the template's token grid."""
        return self.template_size // self.patch_size

    @property
    def search_grid(self) -> int:
        """Side of the search region's token grid and of the score map."""
        return self.search_size // self.patch_size

    @property
    def ffn_hidden(self) -> int:
        """Hidden width of the block's FFN (DINOv2 rounds SwiGLU's to a multiple of 8)."""
        if self.ffn == "swiglu":
            return (int(4 * self.dim * 2 / 3) + 7) // 8 * 8
        return 4 * self.dim


def _table() -> dict[str, Variant]:
    sizes = {
        "S": Variant(name="S", timm_name="vit_small_patch14_dinov2.lvd142m",
                     dim=384, depth=12, num_heads=6,
                     template_size=112, search_size=224, search_area_factor=4.0),
        "B": Variant(name="B", timm_name="vit_base_patch14_dinov2.lvd142m",
                     dim=768, depth=12, num_heads=12,
                     template_size=112, search_size=224, search_area_factor=4.0),
        "L": Variant(name="L", timm_name="vit_large_patch14_dinov2.lvd142m",
                     dim=1024, depth=24, num_heads=16, drop_path=0.1,
                     template_size=112, search_size=224, search_area_factor=4.0),
        "g": Variant(name="g", timm_name="vit_giant_patch14_dinov2.lvd142m",
                     dim=1536, depth=40, num_heads=24, ffn="swiglu", drop_path=0.4,
                     template_size=112, search_size=224, search_area_factor=4.0),
    }  # fmt: skip
    table: dict[str, Variant] = {}
    for letter, row in sizes.items():
        for search, template, factor in ((224, 112, 4.0), (378, 196, 5.0)):
            name = f"{letter}-{search}"
            table[name] = dataclasses.replace(
                row,
                name=name,
                template_size=template,
                search_size=search,
                search_area_factor=factor,
            )
    table["T-112"] = Variant(
        name="T-112", timm_name=None, dim=128, depth=4, num_heads=2, pretrain_grid=8,
        init_std=128**-0.5,
        template_size=56, search_size=112, search_area_factor=4.0, recipe="small",
    )  # fmt: skip
    table["T-168"] = dataclasses.replace(
        table["T-112"], name="T-168", pretrain_grid=12, template_size=84, search_size=168,
        recipe="brief",
    )  # fmt: skip
    table["N-112"] = Variant(
        name="N-112", timm_name=None, dim=64, depth=2, num_heads=1, pretrain_grid=8,
        init_std=64**-0.5,
        template_size=56, search_size=112, search_area_factor=4.0, recipe="small",
    )  # fmt: skip
    return table


VARIANTS: dict[str, Variant] = _table()
"""All variants by name: S, B, L, g × 224, 378 of the paper; T-168, T-112 and N-112 for CPUs."""


def get_variant(name: str) -> Variant:
    """Return the variant of that name.

    Raises:
        UserError: if there is none.
    """
    if name not in VARIANTS:
        raise UserError(f"There is no variant {name}; choose from {', '.join(VARIANTS)}.")
    return VARIANTS[name]
