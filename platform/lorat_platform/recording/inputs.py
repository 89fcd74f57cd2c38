"""A data set as an input of a run, in MLflow's terms.

MLflow finds the runs that read one by ``dataset.digest = 'DIGEST'``.  What a run read it for stands
at the input itself: a condition on ``dataset.context`` is met by any input of the run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

import pyarrow as pa

from lorat.data.shards.rows import SHARD_SCHEMA

if TYPE_CHECKING:
    from lorat.data.shards.frame_index import FrameIndex

Context = Literal["training", "validation", "evaluation"]
"""What a run reads a data set for."""
MAX_DIGEST = 36
"""Characters of a fingerprint that MLflow takes as the digest; its profile has all of them."""
SOURCES = {"s3": "s3", "gs": "gs"}
"""MLflow's names of where data lies, by the scheme of the address; anything else is local."""


def dataset_inputs(sets: Iterable[tuple[FrameIndex, Context, str]]) -> list[dict[str, str]]:
    """Return what MLflow stores of the data sets that a run reads, each once.

    Args:
        sets: each set's index, what it is read for, and the name under which the run knows it.
    """
    of_set: dict[tuple[str, str], dict[str, str]] = {}
    for index, context, name in sets:
        one = _input(index, context, name)
        same = of_set.setdefault((one["name"], one["digest"]), one)
        if context not in same["context"].split(", "):
            same["context"] += f", {context}"
    return list(of_set.values())


def _input(index: FrameIndex, context: Context, name: str) -> dict[str, str]:
    columns = [
        {"name": field.name, "type": _type_name(field.type), "required": True}
        for field in SHARD_SCHEMA
    ]
    profile = {
        "fingerprint": index.fingerprint,
        "tracks": index.num_tracks,
        "frames": index.num_frames,
        "split": index.split,
        "storage": index.storage,
    }
    return {
        "name": name,
        "digest": index.fingerprint[:MAX_DIGEST],
        "source_type": SOURCES.get(index.uri.partition("://")[0], "local"),
        "source": json.dumps({"uri": index.uri}),
        "schema": json.dumps({"mlflow_colspec": columns}),
        "profile": json.dumps(profile),
        "context": context,
    }


def _type_name(kind: pa.DataType) -> str:
    """Return MLflow's word for the type of a column."""
    if pa.types.is_floating(kind):
        return "float"
    if pa.types.is_integer(kind):
        return "integer" if kind.bit_width < 64 and pa.types.is_signed_integer(kind) else "long"
    return {"bool": "boolean", "string": "string", "binary": "binary"}[str(kind)]
