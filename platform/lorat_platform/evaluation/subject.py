"""What is evaluated: a trained model or a baseline, known by a fingerprint."""

from __future__ import annotations

import ast
import functools
import hashlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import lorat
from lorat.tracking.baselines import BASELINES, baseline

if TYPE_CHECKING:
    from lorat.model.network import LoRAT
    from lorat.tracking.one_pass import SequenceTracker


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A tracker that can be sent to workers and built there."""

    name: str
    """How people call it: the URI, with a version instead of an alias, or the baseline's."""
    fingerprint: str
    """Hash of the weights, of how to track and of the code that does; results are kept under it."""
    variant: str | None
    model: LoRAT | None
    """Merged, on the CPU; none for a baseline."""

    def tracker(self, device: str | None = None) -> SequenceTracker:
        """Build the tracker on this machine."""
        if self.model is None:
            return baseline(self.name)
        from lorat.tracking.tracker import Tracker

        return Tracker(self.model, device=device)


def load_subject(uri: str, *, variant: str | None = None) -> Subject:
    """Load a model that :func:`lorat_platform.registry.versions.resolve` takes, or a baseline.

    Args:
        uri: a model, or one of :data:`lorat.tracking.baselines.BASELINES`.
        variant: needed for a released file.

    Raises:
        UserError: if there is no such model, or OpenCV was built without the baseline.
    """
    if uri in BASELINES:
        baseline(uri)  # refused here, not on every worker
        return Subject(name=uri, fingerprint=_digest([uri]), variant=None, model=None)
    from lorat_platform.registry import versions

    if uri.startswith("models:/") and "@" in uri:  # an alias may move while we work
        uri = "models:/{}/{}".format(*versions.version_of(uri))
    return subject_of(versions.load(uri, variant=variant), uri)


def subject_of(model: LoRAT, name: str) -> Subject:
    """Make a subject of a model in memory; adapters are folded in."""
    merged = model.merge() if model.adaptation is not None else model
    weights = (
        f"{key} {tensor.dtype}".encode() + tensor.detach().contiguous().cpu().float().numpy().data
        for key, tensor in merged.state_dict().items()
    )
    parts = itertools.chain([repr(merged.tracking)], weights)
    return Subject(name=name, fingerprint=_digest(parts), variant=model.variant.name, model=merged)


def _digest(parts: Iterable[str | bytes]) -> str:
    digest = hashlib.sha256(code_fingerprint().encode())
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()


def code_fingerprint() -> str:
    """Return a hash of the code that tracks, so that no result of older code is taken for new."""
    digest = hashlib.sha256()
    for name in sorted(tracking_modules()):
        digest.update(_source(name).read_bytes())
    return digest.hexdigest()


@functools.cache
def tracking_modules() -> frozenset[str]:
    """Return the modules that tracking imports of ``lorat``, directly or through others.

    Returns:
        Dotted names below ``lorat``, such as ``tracking.tracker``; of a room, its ``__init__``.
    """
    found: set[str] = set()
    to_read = ["tracking.tracker", "tracking.one_pass", "tracking.baselines"]
    while to_read:
        name = to_read.pop()
        if name in found or not _source(name).exists():
            continue
        found.add(name)
        room = name.rpartition(".")[0]
        to_read += [room] if room else []
        for node in ast.walk(ast.parse(_source(name).read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lorat":
                module = (node.module or "").partition(".")[2]
                to_read += [f"{module}.{alias.name}".lstrip(".") for alias in node.names]
                to_read += [module] if module else []
    return frozenset(found)


def _source(name: str) -> Path:
    """Return the file of a module of ``lorat``, which may not be there."""
    place = Path(lorat.__file__).parent.joinpath(*name.split("."))
    return place / "__init__.py" if place.is_dir() else place.with_name(f"{place.name}.py")
