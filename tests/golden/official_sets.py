"""Models and variants of the fixture sets, from their scalars and shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorat.config.variants import Variant


def variant_of(io: Mapping[str, Any], *, pretrain_grid: int = 37) -> Variant:
    """Return the sizes that a set's ``meta_*`` scalars and images give."""
    return Variant(
        name="fixture",
        timm_name=None,
        dim=int(io["meta_embed_dim"]),
        depth=int(io["meta_depth"]),
        num_heads=int(io["meta_num_heads"]),
        ffn="swiglu" if str(io["meta_ffn"]).startswith("swiglu") else "mlp",
        pretrain_grid=pretrain_grid,
        template_size=io["z"].shape[-1],
        search_size=io["x"].shape[-1],
        search_area_factor=4.0,
    )
