"""The time left counts what comes after the last step."""

from __future__ import annotations

import dataclasses

import pytest

from lorat.config.training import TrainConfig, resolve
from lorat.data.shards.frame_index import FrameIndex
from lorat_platform.cluster.connection import Cluster
from lorat_platform.data.sources import Datasets, Source
from lorat_platform.training.after import AfterLastStep
from lorat_platform.training.options import RunOptions
from lorat_platform.training.resources import Placement
from tests.small_shards import make_shards

CONFIG = resolve(TrainConfig(variant="N-112"))
LAPTOP = Cluster(embedded=True, address="", cpus=2, gpus=0, nodes=1)
SERVER = dataclasses.replace(LAPTOP, cpus=16, gpus=2)


@pytest.fixture(scope="module")
def val(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_shards(tmp_path_factory.mktemp("after") / "val")


def plan(val: str | None, cluster: Cluster, *, validated: bool = False, **options) -> AfterLastStep:
    sources = (Source(name="val", uri=val),) if val else ()
    asked = RunOptions(**options)
    assert CONFIG.batch_size is not None
    place = Placement.plan(asked, cluster, CONFIG.batch_size)
    return AfterLastStep.plan(
        CONFIG,
        asked,
        Datasets(train=(), val=sources, fingerprints={}),
        cluster,
        place,
        validated=validated,
        val_gpus=min(1, place.spare_gpus),
    )


def test_each_part_of_the_end_adds_to_the_time_left(val: str) -> None:
    frames = FrameIndex.open(val).num_frames
    without = plan(None, LAPTOP, register=False)
    registered = plan(None, LAPTOP)
    alone = plan(val, LAPTOP, baselines=("none",))
    beside = plan(val, LAPTOP)
    validated = plan(val, LAPTOP, validated=True)
    assert without.forwards == registered.forwards == 0
    assert alone.forwards == frames
    parts = [p.seconds(0.01) for p in (without, registered, alone, beside, validated)]
    assert parts == sorted(set(parts)), "each is longer than the one before"
    assert alone.seconds(0.02) - alone.seconds(0.01) == pytest.approx(0.01 * frames)
    assert plan(val, LAPTOP, final_evaluation=False).forwards == 0


def test_gpus_share_the_frames_and_a_free_one_validates(val: str) -> None:
    frames = FrameIndex.open(val).num_frames
    assert plan(val, SERVER).forwards == frames / 2
    both = plan(val, SERVER, validated=True, val_pairs=64, val_sequences=10**6)
    assert both.forwards == 64 + frames + frames / 2
    busy = plan(val, SERVER, validated=True, workers="2")
    assert busy.forwards == frames / 2
    assert busy.other_s > plan(val, SERVER, workers="2").other_s
