"""Training pairs: pair i is a pure function of (seed, i).

Data set, track, frames, jitter and augmentation parameters of pair i follow from the seed and i
alone.  So every number of workers sees the same samples, resuming needs nothing but a position,
and a stream of pairs has no epochs.  Nothing here imports torch.

Three parts of the draw are scheduled rather than random, as functions of i: the data sets come in
their exact shares, and the tracks of a data set are dealt without replacement, shuffled anew in
every cycle.  The rest is drawn from a PCG64 whose state is a hash of (seed, i, attempt).
"""

from __future__ import annotations

import bisect
import itertools
import logging
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from lorat.config.training import AugmentConfig, SamplingConfig
from lorat.config.variants import Variant
from lorat.data.pairs.augment_draws import AUGMENT_FIELDS, draw_augmentation
from lorat.data.pairs.mixture import DatasetSchedule
from lorat.data.pairs.permutation import mix, permute
from lorat.errors import UserError
from lorat.image.boxes import Box
from lorat.image.codec import DamagedImage
from lorat.image.crops import CropParams, crop_params, jittered_crop_params, resample

if TYPE_CHECKING:
    from lorat.data.shards.frame_index import FrameIndex

_log = logging.getLogger(__name__)

MAX_DRAWS = 1_000
MAX_REPLACEMENTS = 100
_PCG64_INCREMENT = 0x5851F42D4C957F2D14057B7EF767814F


class PairSpec(NamedTuple):
    """Everything that decides one pair, before any image is read."""

    number: int
    """The i that it is a function of."""
    dataset: int
    track: int
    template_row: int
    search_row: int
    template_box: Box
    """Box in the template frame, in frame pixels."""
    search_box: Box
    template_params: CropParams
    """Nominal crop; the pixel-aligned resampling adjusts it."""
    search_params: CropParams
    augment: tuple[float, ...]
    """Values of :data:`lorat.data.pairs.augment_draws.AUGMENT_FIELDS`."""


class Reader(Protocol):
    """What :func:`load_pairs` needs of an image reader."""

    def decode_region(self, row: int, region_px: Box) -> tuple[np.ndarray, Box]:
        """Return at least a region of a frame as RGB uint8, and the part of the frame it shows.

        Raises ``DamagedImage``.
        """
        ...


class PairSampler:
    """Draw pair i of a weighted mixture of data sets.

    Args:
        indexes: frame indexes of the data sets.
        weights: one positive weight per data set; only their ratios count.
        variant: sizes and area factors of the crops.
        sampling: gap and jitter.
        augment: augmentation whose parameters are drawn.
        seed: 0 or more.

    Raises:
        UserError: if a data set has no usable frame, or the weights do not fit.
    """

    def __init__(
        self,
        indexes: Sequence[FrameIndex],
        weights: Sequence[float],
        variant: Variant,
        sampling: SamplingConfig,
        augment: AugmentConfig,
        seed: int,
    ):
        if len(indexes) != len(weights):
            raise UserError(
                f"There are {len(indexes)} data sets but {len(weights)} weights; give one each."
            )
        self.indexes = list(indexes)
        self.weights = list(weights)
        self.variant = variant
        self.sampling = sampling
        self.augment = augment
        self.seed = seed
        self.schedule = DatasetSchedule(weights, seed)
        self._cumulative = list(itertools.accumulate(self.schedule.counts))
        self._local = threading.local()
        self._tracks = [_usable_tracks(index) for index in indexes]

    def __reduce__(self) -> tuple[object, ...]:
        arguments = (
            self.indexes,
            self.weights,
            self.variant,
            self.sampling,
            self.augment,
            self.seed,
        )
        return PairSampler, arguments

    def sample(self, index: int, attempt: int = 0) -> PairSpec:
        """Draw pair ``index``; a higher ``attempt`` is its next replacement.

        When the jitter finds no acceptable crop, or in a replacement, data set (by weight) and
        track (uniformly) are drawn afresh.

        Raises:
            UserError: if a thousand draws in a row give no acceptable crop.
        """
        rng = self._generator(index, attempt)
        if attempt == 0:
            dataset, ordinal = self.schedule(index)
            num_tracks, tracks = self._tracks[dataset]
            cycle, position = divmod(ordinal, num_tracks)
            track = permute(position, num_tracks, mix(self.seed, dataset, cycle))
            if tracks is not None:
                track = tracks.item(track)
        else:
            dataset, track = self._fresh_track(rng)
        for _ in range(MAX_DRAWS):
            spec = self._draw(index, dataset, track, rng)
            if spec is not None:
                return spec
            dataset, track = self._fresh_track(rng)
        raise UserError(
            f"No acceptable crop in {MAX_DRAWS} draws for pair {index}; lower "
            f"sampling.min_object_size (now {self.sampling.min_object_size}) or the jitters, "
            "or check the boxes of the data."
        )

    def _generator(self, index: int, attempt: int) -> np.random.Generator:
        """Return this thread's generator, set to the stream of one draw (1 µs; a new one: 10)."""
        if not hasattr(self._local, "generator"):
            self._local.generator = np.random.Generator(np.random.PCG64(0))
        state = mix(self.seed, index, attempt)
        self._local.generator.bit_generator.state = {
            "bit_generator": "PCG64",
            "state": {"state": (state << 64) | mix(state), "inc": _PCG64_INCREMENT},
            "has_uint32": 0,
            "uinteger": 0,
        }
        return self._local.generator

    def _fresh_track(self, rng: np.random.Generator) -> tuple[int, int]:
        point = int(rng.random() * self._cumulative[-1])
        dataset = bisect.bisect_right(self._cumulative, point)
        num_tracks, tracks = self._tracks[dataset]
        track = int(rng.random() * num_tracks)
        return dataset, track if tracks is None else tracks.item(track)

    def _draw(
        self, index: int, dataset: int, track: int, rng: np.random.Generator
    ) -> PairSpec | None:
        frames, sampling, variant = self.indexes[dataset], self.sampling, self.variant
        rows, number_of = frames.valid_rows, frames.frame_number.item
        start, stop = frames.valid_start.item(track), frames.valid_start.item(track + 1)
        template_at = start + int(rng.random() * (stop - start))
        template_row = rows.item(template_at)
        search_row = template_row
        if stop - start > 1:
            gap, number = sampling.max_gap, number_of(template_row)
            low = bisect.bisect_left(
                rows, number - gap, max(start, template_at - gap), template_at, key=number_of
            )
            high = bisect.bisect_right(
                rows, number + gap, template_at + 1, min(stop, template_at + gap + 1), key=number_of
            )
            if high - low > 1:
                search_at = low + int(rng.random() * (high - low - 1))
                search_row = rows.item(search_at + (search_at >= template_at))
        template_box = tuple(frames.box[template_row].tolist())
        search_box = tuple(frames.box[search_row].tolist())
        search_params, accepted = jittered_crop_params(
            search_box,
            variant.search_area_factor,
            variant.search_size,
            rng,
            scale_jitter=sampling.scale_jitter,
            translation_jitter=sampling.translation_jitter,
            min_object_size=sampling.min_object_size,
            max_tries=sampling.max_tries,
        )
        if not accepted:
            return None
        return PairSpec(
            index,
            dataset,
            track,
            template_row,
            search_row,
            template_box,
            search_box,
            crop_params(template_box, variant.template_area_factor, variant.template_size),
            search_params,
            draw_augmentation(self.augment, rng),
        )


def load_pairs(
    sampler: PairSampler,
    readers: Sequence[Reader],
    indices: Sequence[int],
    out: dict[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Read, decode and crop pairs; a damaged image is logged and its pair replaced.

    Args:
        readers: one per data set of the sampler, in its order.
        indices: pairs to load; -1 gives a padding row of zeros and reads nothing.
        out: arrays to fill, as :func:`empty_pairs` gives them; none for new ones.

    Returns:
        ``template`` (b, T, T, 3) and ``search`` (b, S, S, 3) uint8 RGB; ``template_box`` and
        ``search_box`` float32 (b, 4) xyxy in crop pixels, not clipped; ``augment`` float32
        (b, 12), see :data:`lorat.data.pairs.augment_draws.AUGMENT_FIELDS`; ``index`` and
        ``bytes_read`` int64 (b,); ``damaged`` int32 (b,), images found damaged before a good pair
        was found; ``dataset`` int32 (b,), -1 for padding.

    Raises:
        DamagedImage: if a hundred replacements in a row are damaged, too.
    """
    batch = empty_pairs(sampler.variant, len(indices)) if out is None else out
    batch["index"][:] = indices
    batch["bytes_read"][:] = batch["damaged"][:] = 0
    for row, index in enumerate(batch["index"].tolist()):
        if index >= 0:
            _load_pair(sampler, readers, index, batch, row)
        else:
            for name, array in batch.items():
                array[row] = -1 if name in ("index", "dataset") else 0
    return batch


def empty_pairs(variant: Variant, num: int) -> dict[str, np.ndarray]:
    """Return the arrays that :func:`load_pairs` fills, with anything in them."""
    template_size, search_size = variant.template_size, variant.search_size
    return {
        "template": np.empty((num, template_size, template_size, 3), dtype=np.uint8),
        "search": np.empty((num, search_size, search_size, 3), dtype=np.uint8),
        "template_box": np.empty((num, 4), dtype=np.float32),
        "search_box": np.empty((num, 4), dtype=np.float32),
        "augment": np.empty((num, len(AUGMENT_FIELDS)), dtype=np.float32),
        "index": np.empty(num, dtype=np.int64),
        "bytes_read": np.empty(num, dtype=np.int64),
        "damaged": np.empty(num, dtype=np.int32),
        "dataset": np.empty(num, dtype=np.int32),
    }


def _load_pair(
    sampler: PairSampler,
    readers: Sequence[Reader],
    index: int,
    batch: dict[str, np.ndarray],
    row: int,
) -> None:
    for attempt in range(MAX_REPLACEMENTS + 1):
        spec = sampler.sample(index, attempt)
        frames, reader = sampler.indexes[spec.dataset], readers[spec.dataset]
        images: dict[int, tuple[np.ndarray, Box]] = {}
        try:
            for frame, region in _needed_regions(spec, sampler.variant).items():
                batch["bytes_read"][row] += frames.length[frame]
                images[frame] = reader.decode_region(frame, region)
        except DamagedImage as error:
            _log.warning("pair %d is replaced, an image is damaged: %s", index, error)
            batch["damaged"][row] += 1
            if attempt == MAX_REPLACEMENTS:
                raise
            continue
        break
    for role, frame, box, nominal in (
        ("template", spec.template_row, spec.template_box, spec.template_params),
        ("search", spec.search_row, spec.search_box, spec.search_params),
    ):
        image, window = images[frame]
        batch[role][row], adjusted = resample(
            image,
            nominal,
            batch[role].shape[1],
            frames.mean_rgb[frame],
            window=window,
            exact=False,
        )
        batch[f"{role}_box"][row] = adjusted.apply(box)
    batch["augment"][row] = spec.augment
    batch["dataset"][row] = spec.dataset


def _needed_regions(spec: PairSpec, variant: Variant) -> dict[int, Box]:
    """Return the part of each frame that the crops of a pair show, in frame pixels."""
    size = float(variant.search_size)
    search = spec.search_params.inverse().apply((0.0, 0.0, size, size))
    size = float(variant.template_size)
    template = spec.template_params.inverse().apply((0.0, 0.0, size, size))
    if spec.template_row != spec.search_row:
        return {spec.template_row: template, spec.search_row: search}
    low = (min(template[0], search[0]), min(template[1], search[1]))
    return {spec.search_row: (*low, max(template[2], search[2]), max(template[3], search[3]))}


def _usable_tracks(index: FrameIndex) -> tuple[int, np.ndarray | None]:
    """Return the number of tracks with a usable box, and their numbers unless these are all."""
    usable = np.diff(index.valid_start) > 0
    count = int(usable.sum())
    if count == 0:
        raise UserError(f"Data set {index.name} has no frame with a usable box; ingest it again.")
    if count == len(usable):
        return count, None
    return count, np.flatnonzero(usable)
