"""A mixture is read as it is documented, and wrong ones are refused in a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorat.config.training import SamplingConfig, TrainConfig, resolve
from lorat.errors import UserError
from lorat_platform.data.sources import open_datasets, parse_sources, resolve_sources
from tests.small_shards import make_shards


def test_names_and_weights_are_optional() -> None:
    (only,) = parse_sources("/data/got10k-train")
    assert (only.name, only.uri, only.weight) == ("got10k-train", "/data/got10k-train", 1.0)
    lasot, coco = parse_sources("lasot=s3://bucket/lasot?endpoint_override=x, coco=/data/coco*0.5")
    assert (lasot.name, lasot.uri) == ("lasot", "s3://bucket/lasot?endpoint_override=x")
    assert (coco.name, coco.uri, coco.weight) == ("coco", "/data/coco", 0.5)


@pytest.mark.parametrize("text", ["", "a=/x,,b=/y", "/x*0", "/x*-1", "/x*many", "/a/x,/b/x"])
def test_a_wrong_mixture_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        parse_sources(text)


def test_windows_are_refused_where_they_are_too_small_or_would_flatter(tmp_path: Path) -> None:
    windows = make_shards(tmp_path / "windows", split="train")
    config = TrainConfig(variant="B-224", data=windows)
    assert open_datasets(resolve(config)).fingerprints
    with pytest.raises(UserError, match=r"224-px search crops.*--variant B-378"):
        open_datasets(resolve(TrainConfig(variant="B-378", data=windows)))
    wider = SamplingConfig(translation_jitter=5.0)
    with pytest.raises(UserError, match=r"this sampling.*--full-frame, or train with the usual"):
        open_datasets(resolve(TrainConfig(variant="B-224", data=windows, sampling=wider)))
    with pytest.raises(UserError, match="--full-frame"):
        open_datasets(resolve(TrainConfig(variant="B-224", data=windows, val_data=windows)))


def test_addresses_do_not_depend_on_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (source,) = resolve_sources("shards/train", "train")
    assert source.uri == str(tmp_path / "shards" / "train")
