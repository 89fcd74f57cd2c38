"""What is evaluated: a trained model or a baseline, known by a fingerprint."""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import lorat
from lorat.baselines import BASELINES, baseline

if TYPE_CHECKING:
    from lorat.model import LoRAT
    from lorat.one_pass import SequenceTracker


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A tracker that can be sent to workers and built there."""

    name: str
    """How people call it: the URI, with a version instead of an alias, or ``static`` or ``mil``."""
    fingerprint: str
    """Hash of the weights and of the code that tracks; results are kept under it."""
    variant: str | None
    model: LoRAT | None
    """Merged, on the CPU; none for a baseline."""

    def tracker(self, device: str | None = None) -> SequenceTracker:
        """Build the tracker on this machine."""
        if self.model is None:
            return baseline(self.name)
        from lorat.tracker import Tracker

        return Tracker(self.model, device=device)


def load_subject(uri: str, *, variant: str | None = None) -> Subject:
    """Load a model from anything that :func:`lorat_platform.registry.resolve` takes, or a baseline.

    Args:
        uri: a model, or ``static`` or ``mil``.
        variant: needed for a released file.

    Raises:
        UserError: if there is no such model.
    """
    if uri in BASELINES:
        return Subject(name=uri, fingerprint=_digest([uri]), variant=None, model=None)
    from lorat_platform import registry

    if uri.startswith("models:/") and "@" in uri:  # an alias may move while we work
        uri = "models:/{}/{}".format(*registry.version_of(uri))
    return subject_of(registry.load(uri, variant=variant), uri)


def subject_of(model: LoRAT, name: str) -> Subject:
    """Make a subject of a model in memory; adapters are folded in."""
    merged = model.merge() if model.adaptation is not None else model
    parts = (
        f"{key} {tensor.dtype}".encode() + tensor.detach().contiguous().cpu().float().numpy().data
        for key, tensor in merged.state_dict().items()
    )
    return Subject(name=name, fingerprint=_digest(parts), variant=model.variant.name, model=merged)


def _digest(parts: Iterable[str | bytes]) -> str:
    digest = hashlib.sha256(code_fingerprint().encode())
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()


def code_fingerprint() -> str:
    """Return a hash of the code that tracks, so that no result of older code is taken for new."""
    digest = hashlib.sha256()
    folder = Path(lorat.__file__).parent
    for name in sorted(tracking_modules()):
        digest.update((folder / f"{name}.py").read_bytes())
    return digest.hexdigest()


@functools.cache
def tracking_modules() -> frozenset[str]:
    """Return the modules of ``lorat`` that tracking imports, directly or through others."""
    folder = Path(lorat.__file__).parent
    found: set[str] = set()
    to_read = ["tracker", "one_pass", "baselines"]
    while to_read:
        name = to_read.pop()
        if name in found or not (folder / f"{name}.py").exists():
            continue
        found.add(name)
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "lorat":
                to_read += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lorat."):
                to_read.append((node.module or "").removeprefix("lorat."))
    return frozenset(found)
