"""Which datasets a run draws its pairs from, and opening them."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorat.config.training import TrainConfig
from lorat.data.shards.windows import WindowLaw
from lorat.errors import UserError
from lorat.files.storage import locate
from lorat_platform.recording.inputs import Context, dataset_inputs

if TYPE_CHECKING:
    from lorat.data.pairs.sampler import PairSampler
    from lorat.data.shards.frame_index import FrameIndex
    from lorat.data.shards.images import ImageReader

MAX_WEIGHT = 1_000_000
"""Largest weight of a dataset in a mixture."""
SYNTHETIC = "synthetic"
SYNTHETIC_PRETRAIN = "synthetic-pretrain"
"""The split that the shipped small backbone was pretrained on."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One dataset of a mixture."""

    name: str
    uri: str
    weight: float = 1.0


def parse_sources(text: str) -> tuple[Source, ...]:
    """Read ``URI`` or ``NAME=URI,NAME=URI``, each with an optional ``*WEIGHT`` up to 1,000,000.

    Raises:
        UserError: for an empty part, a weight that is no positive number, or a name given twice.
    """
    sources = []
    for part in text.split(","):
        match = re.fullmatch(r"(?:([\w.-]+)=)?(.+?)(?:\*([^*/]*))?", part.strip())
        if match is None:
            raise UserError(
                f"data is {text!r}, which has an empty part; give URI or NAME=URI,NAME=URI, each "
                "with an optional *WEIGHT."
            )
        name, uri, weight = match.groups()
        try:
            number = 1.0 if weight is None else float(weight)
        except ValueError:
            number = 0.0
        if not 0 < number <= MAX_WEIGHT:
            raise UserError(
                f"The weight of {uri} is {weight!r}; give a number above 0, at most {MAX_WEIGHT:,}."
            )
        sources.append(Source(name=name or _last_part(uri), uri=uri, weight=number))
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"data names {name} twice; give every dataset its own NAME=URI.")
    return tuple(sources)


def _last_part(uri: str) -> str:
    path = uri.split("?")[0].rstrip("/")
    return re.sub(r"[^\w.-]+", "-", path.rpartition("/")[2]) or "data"


def resolve_sources(text: str, split: str) -> tuple[Source, ...]:
    """Parse a mixture and make the synthetic dataset if it is named and missing.

    Args:
        text: as for :func:`parse_sources`; ``synthetic`` and ``synthetic-pretrain`` may stand for
            an address.
        split: ``train`` or ``val``, of the synthetic dataset.
    """
    resolved = []
    for source in parse_sources(text):
        if source.uri in (SYNTHETIC, SYNTHETIC_PRETRAIN):
            from lorat.data import synthetic

            made = split if source.uri == SYNTHETIC else "pretrain"
            uri = synthetic.ensure(None, made)  # type: ignore[arg-type]
        else:
            uri = locate(source.uri).uri  # workers have other working directories
        resolved.append(Source(name=source.name, uri=uri, weight=source.weight))
    return tuple(resolved)


def with_whole_paths(config: TrainConfig) -> TrainConfig:
    """Name local files and folders by their whole paths: workers have other working directories."""

    def whole(value: str) -> str:
        return str(Path(value).resolve()) if Path(value).exists() else value

    changes: dict[str, Any] = {}
    for name in ("backbone", "init_from"):
        if value := getattr(config, name):
            changes[name] = whole(value)
    for name in ("data", "val_data"):
        if value := getattr(config, name):
            changes[name] = ",".join(
                f"{source.name}={whole(source.uri)}*{source.weight:g}"
                if source.uri not in (SYNTHETIC, SYNTHETIC_PRETRAIN) and Path(source.uri).exists()
                else part
                for source, part in zip(parse_sources(value), value.split(","), strict=True)
            )
    return dataclasses.replace(config, **changes)


def open_indexes(sources: tuple[Source, ...]) -> list[FrameIndex]:
    """Open the frame index of every source.

    Raises:
        UserError: if one is missing or damaged.
    """
    from lorat.data.shards.frame_index import FrameIndex

    return [FrameIndex.open(source.uri) for source in sources]


def open_pairs(
    config: TrainConfig, sources: tuple[Source, ...], *, seed: int | None = None
) -> tuple[PairSampler, list[ImageReader]]:
    """Open everything that :func:`lorat.data.pairs.sampler.load_pairs` needs; no torch is imported.

    Args:
        config: variant, sampling and augmentation.
        sources: the mixture.
        seed: instead of the configuration's.
    """
    from lorat.data.pairs.sampler import PairSampler
    from lorat.data.shards.images import ImageReader

    indexes = open_indexes(sources)
    sampler = PairSampler(
        indexes,
        [source.weight for source in sources],
        config.model_variant,
        config.sampling,
        config.augment,
        config.seed if seed is None else seed,
    )
    return sampler, [ImageReader(index) for index in indexes]


def fingerprints(sources: tuple[Source, ...]) -> dict[str, str]:
    """Return name -> fingerprint of every dataset."""
    return {
        source.name: index.fingerprint
        for source, index in zip(sources, open_indexes(sources), strict=True)
    }


@dataclass(frozen=True, kw_only=True)
class Datasets:
    """What a training reads."""

    train: tuple[Source, ...]
    val: tuple[Source, ...]
    fingerprints: dict[str, str]
    """Of the training sets, by name."""


def open_datasets(config: TrainConfig) -> Datasets:
    """Find the datasets of a resolved configuration, making the synthetic ones if needed.

    Raises:
        UserError: if one is missing, damaged, or not fit for its purpose.
    """
    train = resolve_sources(config.data, "train")
    val = resolve_sources(config.val_data, "val") if config.val_data else ()
    for source, index in zip(val, open_indexes(val), strict=True):
        if index.storage == "window":
            raise UserError(
                f"val_data {source.uri} stores windows around the target, which a tracker may "
                "leave; ingest it again with --full-frame."
            )
    for source, index in zip(train, open_indexes(train), strict=True):
        law = index.manifest["window"]
        if law and not WindowLaw(**law).serves(config.model_variant, config.sampling):
            remedy = f"--variant {config.variant}"
            if not WindowLaw.for_variant(config.model_variant).serves(
                config.model_variant, config.sampling
            ):
                remedy = "--full-frame, or train with the usual sampling"
            raise UserError(
                f"data {source.uri} stores windows for {law['search_size']}-px search crops, too "
                f"small for {config.variant} with this sampling; ingest it again with {remedy}."
            )
    return Datasets(train=train, val=val, fingerprints=fingerprints(train))


def inputs_of(train: tuple[Source, ...], val: tuple[Source, ...]) -> list[dict[str, str]]:
    """Return the data sets of a training as inputs of its run, under the run's names of them."""
    sets: list[tuple[FrameIndex, Context, str]] = [
        (index, "training", source.name)
        for source, index in zip(train, open_indexes(train), strict=True)
    ]
    sets += [
        (index, "validation", source.name)
        for source, index in zip(val, open_indexes(val), strict=True)
    ]
    return dataset_inputs(sets)
