"""Which runs read a data set can be asked."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lorat.data.shards.frame_index import FrameIndex
from lorat_platform.recording.inputs import dataset_inputs
from lorat_platform.recording.run import open_run
from lorat_platform.recording.store import connect, tracking_uri
from tests.small_shards import make_shards

README = Path(__file__).resolve().parents[3] / "infra" / "README.md"
(README_QUERY,) = re.findall(r"```python\n(.*?search_runs.*?)```", README.read_text(), re.DOTALL)
"""How the page for operators asks which models saw a data set."""


@pytest.mark.usefixtures("own_store")
def test_the_runs_that_saw_a_data_set_are_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri())
    train, val = (
        FrameIndex.open(make_shards(tmp_path / split, split=split)) for split in ("train", "val")
    )
    with open_run("lorat", "both", folder=tmp_path / "a") as both:
        for _ in range(2):  # a run that goes on says it again
            both.log_inputs(
                dataset_inputs([(train, "training", "train"), (val, "validation", "val")])
            )
    with open_run("lorat", "one", folder=tmp_path / "b") as one:
        one.log_inputs(dataset_inputs([(val, "training", "x"), (val, "validation", "x")]))
    client = connect()
    experiment = client.get_run(both.wait_for_id()).info.experiment_id

    def saw(index: FrameIndex) -> dict[str, str]:
        """Return what the runs that read a set read it for, by their names."""
        digest = index.fingerprint[:36]
        return {
            run.info.run_name: each.tags[0].value
            for run in client.search_runs([experiment], f"dataset.digest = '{digest}'")
            for each in run.inputs.dataset_inputs
            if each.dataset.digest == digest
        }

    assert saw(train) == {"both": "training"}
    assert saw(val) == {"both": "validation", "one": "training, validation"}
    exec(README_QUERY.replace('"..."', f'"{val.fingerprint}"'))
    assert sorted(capsys.readouterr().out.splitlines()) == [
        "both validation []",
        "one training, validation []",
    ]
    first, second = client.get_run(both.wait_for_id()).inputs.dataset_inputs
    stored = {i.dataset.name: i.dataset for i in (first, second)}["val"]
    assert (stored.source_type, json.loads(stored.source)) == ("local", {"uri": val.uri})
    columns = {c["name"]: c["type"] for c in json.loads(stored.schema)["mlflow_colspec"]}
    assert columns["jpeg"] == "binary" and columns["box_x1"] == "float"
    assert columns["valid"] == "boolean" and columns["crc32"] == "long"
    profile = json.loads(stored.profile)
    assert (profile["fingerprint"], profile["frames"]) == (val.fingerprint, val.num_frames)
