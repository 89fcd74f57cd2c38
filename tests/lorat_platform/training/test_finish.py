"""The end of a training may be repeated after a kill without doing anything twice."""

from __future__ import annotations

import http.server
import threading
from pathlib import Path
from typing import cast

import pytest

from infra.processes import free_port
from lorat.checkpoint import save_merged
from lorat.config.fields import to_dict
from lorat.config.training import TrainConfig, resolve
from lorat.errors import UserError
from lorat.files.storage import locate
from lorat_platform.cluster.connection import Cluster
from lorat_platform.cluster.phases import Phases
from lorat_platform.data.sources import Datasets
from lorat_platform.recording.remote import RemoteRun
from lorat_platform.recording.run import open_run
from lorat_platform.recording.store import connect
from lorat_platform.runs import checkpoints
from lorat_platform.runs.record import RunRecord
from lorat_platform.training import finish
from lorat_platform.training.finish import TrainingResult
from lorat_platform.training.options import RunOptions
from tests.constant_trackers import random_tracker


class FinishedRun:
    """An MLflow run of which everything has been delivered."""

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id

    def wait_for_id(self, timeout_s: float) -> str:
        return self.run_id

    def flush(self) -> bool:
        return True


def test_a_model_that_was_registered_before_a_kill_is_not_registered_again(
    own_store: Path, tmp_path: Path
) -> None:
    with open_run("lorat", "training") as opened:
        run = cast(RemoteRun, FinishedRun(opened.wait_for_id()))
    config = to_dict(resolve(TrainConfig(variant="N-112", data="/data/train")))
    record = RunRecord(name="run", config=config, data={}, created="")
    result = TrainingResult(
        name="run",
        folder=locate(tmp_path),
        checkpoint="step-00000001",
        step=1,
        metrics={},
        seconds=0.0,
    )

    def register() -> str:
        datasets = Datasets(train=(), val=(), fingerprints={})
        return finish._register(random_tracker(), result, datasets, run, record, {}, [])[1]

    client = connect()
    assert register() == "1"
    client.delete_registered_model_alias("lorat", "candidate")  # killed before it was set
    assert register() == "1"
    assert len(client.search_model_versions("name='lorat'")) == 1
    assert str(client.get_model_version_by_alias("lorat", "candidate").version) == "1"


@pytest.mark.usefixtures("own_store")
@pytest.mark.parametrize("register", [True, False])
def test_the_end_without_mlflow_shows_the_checkpoint_and_no_link(
    register: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    save_merged(random_tracker(), tmp_path / "bundle")
    checkpoints.upload(tmp_path / "bundle", locate(tmp_path), "step-00000001")
    config = to_dict(resolve(TrainConfig(variant="N-112", data="/data/train")))
    record = RunRecord(name="run", config=config, data={}, created="")
    result = TrainingResult(
        name="run",
        folder=locate(tmp_path),
        checkpoint="step-00000001",
        step=1,
        metrics={},
        seconds=0.0,
    )
    opened = open_run("lorat", "run", folder=tmp_path)

    def end() -> TrainingResult:
        return finish.finish(
            result,
            RunOptions(register=register),
            Cluster(embedded=True, address="", cpus=2, gpus=0, nodes=1),
            Datasets(train=(), val=(), fingerprints={}),
            cast(RemoteRun, opened),
            record,
            began=0.0,
            phases=Phases(),
        )

    with caplog.at_level("INFO"):
        if register:
            with pytest.raises(UserError, match=r"does not take the model .*step-00000001: give"):
                end()
        else:
            assert end().mlflow_run_id is None
        opened.close(timeout_s=0.0)
    assert f"checkpoint  {tmp_path}/step-00000001" in caplog.text
    assert "MLflow      " not in caplog.text
    assert "open it" not in caplog.text
    (said,) = (line for line in caplog.messages if "Nothing of this run has arrived" in line)
    journal = opened.journal.folder
    assert f"wait in {journal}. " in said
    assert f"MLFLOW_TRACKING_URI={uri} " in said
    assert said.endswith(f"replay {journal}")


def test_the_last_lines_say_how_to_try_the_tracker_and_how_to_go_on() -> None:
    small = resolve(TrainConfig(variant="N-112"))
    try_it, on_a_page, promote_it, go_on = finish.next_steps(small, "3", larger=True)
    assert "jobs/serve.py --model models:/lorat/3 " in on_a_page
    assert "python jobs/track.py VIDEO --select --model models:/lorat/3 " in try_it
    assert promote_it.endswith("python jobs/promote.py --candidate models:/lorat/3")
    assert " python jobs/train.py --variant S-224 --recipe small " in go_on
    assert finish.next_steps(small, None, larger=True) == [go_on]
    assert finish.next_steps(small, "3", larger=False) == [try_it, on_a_page, promote_it]
    large = resolve(TrainConfig(variant="B-224", data="/data/train"))
    assert finish.next_steps(large, "3", larger=True) == [try_it, on_a_page, promote_it]
    own = resolve(TrainConfig(variant="N-112", data="a=/data/a b", val_data="/data/v"))
    (go_on,) = finish.next_steps(own, None, larger=True)
    assert " --variant S-224 --data 'a=/data/a b' --val-data /data/v " in go_on


class Hub(http.server.BaseHTTPRequestHandler):
    """Has the weights of S-224 alone."""

    def do_HEAD(self) -> None:
        self.send_response(200 if "vit_small_patch14_dinov2" in self.path else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_larger_variants_are_offered_where_the_hub_gives_their_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    assert not finish.hub_has("S-224")
    with http.server.HTTPServer(("127.0.0.1", 0), Hub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
        assert finish.hub_has("S-224")
        assert not finish.hub_has("B-224")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert not finish.hub_has("S-224")
        hub.shutdown()
