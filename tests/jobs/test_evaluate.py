"""`jobs/evaluate.py`, `jobs/promote.py` and `jobs/export.py` on a real store and cluster."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from infra.processes import free_port
from lorat.checkpoint.folder import save_merged
from lorat.metrics.comparison import GateConfig
from lorat.model.network import LoRAT
from lorat_platform import cluster
from lorat_platform.promotion import champion, decision
from lorat_platform.recording.run import open_run
from lorat_platform.recording.store import connect
from lorat_platform.registry import versions
from tests.constant_trackers import shrinking_tracker, staying_tracker
from tests.jobs.in_process import run_in_process
from tests.mlflow_home import make_home
from tests.small_shards import make_shards
from tests.waiting import wait_until

pytestmark = pytest.mark.processes(minutes=2)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_shards(tmp_path_factory.mktemp("data") / "val", num_shards=2)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = make_home(tmp_path / "home")
    monkeypatch.setenv("LORAT_HOME", str(folder))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return folder


def start(name: str, *arguments: object) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.Popen(
        [sys.executable, ROOT / "jobs" / f"{name}.py", *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_job(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    process = start(name, *arguments)
    output, errors = process.communicate(timeout=800)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def register(model: LoRAT, uri: str, tags: dict[str, str] | None = None) -> str:
    with open_run("lorat", "training") as run:
        return versions.register(
            model,
            run_id=run.wait_for_id(),
            reference_set=[uri],
            scores={"eval/made-up/ao": 0.5},
            tags=tags,
        )


def test_evaluation_is_complete_in_mlflow(home: Path, uri: str, tmp_path: Path) -> None:
    version = register(staying_tracker(), uri)
    result = run_job(
        "evaluate", "--model", f"models:/lorat/{version}", "--data", uri,
        "--output", tmp_path / "report", "--limit", 5,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "| synthetic-val | compatible | 5 |" in result.stdout
    client = connect()
    experiment = client.get_experiment_by_name("evaluation")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    scores = json.loads((tmp_path / "report" / "scores.json").read_text())
    assert {k: v for k, v in run.data.metrics.items() if k in scores} == pytest.approx(scores)
    assert "| data set | dialect |" in run.data.tags["mlflow.note.content"]
    assert run.data.params["evaluation.limit"] == "5"
    kept = {
        Path(entry.path).name
        for folder in ("evaluation", "evaluation/synthetic-val", "evaluation/synthetic-val/clips")
        for entry in client.list_artifacts(run.info.run_id, folder)
    }
    assert {"report.md", "success.png", "sequences.csv", "attributes.png"} <= kept
    assert sum(name.endswith(".mp4") for name in kept) == 4
    tags = client.get_model_version("lorat", version).tags
    for name in ("AO", "AO_low", "AO_high"):
        assert float(tags[f"score.synthetic-val/{name}"]) == pytest.approx(
            run.data.metrics[f"synthetic-val/{name}"], abs=1e-4
        )
    results_are_compared_and_explained(tmp_path / "report" / "synthetic-val" / "results", uri)


def results_are_compared_and_explained(results: Path, uri: str) -> None:
    """Raw results need neither the model nor a cluster, and are compared as trackers are."""
    flat, archive = results / "pytracking" / "lorat" / "N-112", results / "got10k.zip"
    few = ("--data", uri, "--limit", 5, "--no-clips")
    both = (f"results:{flat}", f"results:{archive}")
    folder = results / "compared"
    assert run_in_process("evaluate", "--model", *both, *few, "--output", folder) == 0
    text = (folder / "report.md").read_text()
    assert "| got10k.zip |" in text.replace("results/", "")
    assert "behind the best" in text
    compared = {path.name for path in (folder / "synthetic-val").iterdir()}
    assert {"success.png", "precision.png", "attributes.png", "comparison.csv"} <= compared
    client = connect()
    [experiment] = client.search_experiments(filter_string="name = 'evaluation'")
    runs = client.search_runs([experiment.experiment_id])
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    [parent] = {run.data.tags["mlflow.parentRunId"] for run in children}
    assert {run.data.params["model"] for run in children} == set(both)
    assert all("synthetic-val/AO_low" in run.data.metrics for run in children)
    assert "behind the best" in client.get_run(parent).data.tags["mlflow.note.content"]

    explain = ("--explain", archive, "--as", "got10k", "--output", results / "explained")
    assert run_in_process("evaluate", "--model", both[0], *few, *explain) == 0
    [run] = client.search_runs(
        [experiment.experiment_id], "metrics.`synthetic-val/gap_AO` > -1", max_results=2
    )
    note = run.data.tags["mlflow.note.content"]
    assert "| dialect |" in note
    assert "| rounding | theirs |" in note
    place = "evaluation/synthetic-val/explanation"
    kept = {Path(entry.path).name for entry in client.list_artifacts(run.info.run_id, place)}
    assert kept == {
        "explanation.md", "account.csv", "dialects.csv", "sequences.csv", "gap.png",
    }  # fmt: skip


@pytest.mark.exhaustive
@pytest.mark.usefixtures("shared_ray")
def test_killed_evaluation_goes_on(home: Path, uri: str, tmp_path: Path) -> None:
    register(staying_tracker(), uri)
    arguments = ("evaluate", "--model", "models:/lorat@candidate", "--data", uri, "--no-clips",
                 "--output", tmp_path / "report", "--batch-size", 1)  # fmt: skip
    first = start(*arguments)
    wait_until(
        "tracked sequence", lambda: list((home / "evaluations").rglob("*.npz")), process=first
    )
    first.kill()
    first.communicate()
    second = run_job(*arguments)
    assert second.returncode == 0, second.stderr
    assert "of 8 sequences are there already" in second.stdout


def promote(version: str, **options: Any) -> bool:
    """Do what `jobs/promote.py` does once it has a cluster and a run."""
    candidate = decision.Candidate(name="lorat", version=version, **options)
    with cluster.connected(), open_run("promotion", version) as run:
        return decision.promote(candidate, run)


@pytest.mark.usefixtures("shared_ray")
def test_better_candidate_is_promoted_and_worse_is_not(
    home: Path, uri: str, tmp_path: Path
) -> None:
    worse = register(shrinking_tracker(), uri)
    client = connect()
    assert promote(worse)
    assert "no champion" in client.get_model_version("lorat", worse).tags["gate.reason"]

    save_merged(staying_tracker(), tmp_path / "8")  # of the race that it has won
    seeds = {seed: str(tmp_path / seed) for seed in ("7", "8", "9")}
    raced = {"race.seed": "7", "race.seeds": json.dumps(seeds)}
    better = register(staying_tracker(), uri, raced)
    assert promote(better)
    assert champion.champion_of(client) == better
    version = client.get_model_version("lorat", better)
    assert version.tags["gate.decision"] == "promoted"
    numbers = json.loads(version.tags["gate.numbers"])
    assert numbers["interval_low"] > 0
    assert numbers["sequences"] == 8
    assert "better: the 95% interval" in version.description
    assert numbers["candidate_seeds"] == 2
    seen = f"2 seeds of version {better} were seen (7, 8); its race's weights of 9 are gone; one "
    assert f"{seen}seed of version {worse} was seen" in version.description
    run = client.get_run(version.tags["gate.run_id"])
    assert run.data.metrics["difference"] == pytest.approx(numbers["difference"])
    assert "comparison.png" in [a.path for a in client.list_artifacts(run.info.run_id)]
    assert sum(json.loads(version.tags[versions.SCORE_HISTOGRAM])) > 0  # registration had none
    assert [key for key in version.tags if key.startswith("score.")] == ["score.eval/made-up/ao"]
    folder = Path(version.source.removeprefix("file://"))
    assert (folder / "promotion" / "comparison.png").exists()

    assert not promote(worse, gate=GateConfig(metric="sr75"))
    assert champion.champion_of(client) == better
    tags = client.get_model_version("lorat", worse).tags
    assert (tags["gate.decision"], tags["gate.metric"]) == ("refused", "sr75")
    numbers = json.loads(tags["gate.numbers"])
    assert numbers["candidate_sr75"] < numbers["champion_sr75"]

    assert promote(worse, force=True, reason="for the demo")
    assert champion.champion_of(client) == worse
    tags = client.get_model_version("lorat", worse).tags
    assert tags["gate.decision"] == "forced"
    assert tags["gate.note"] == "for the demo"
    assert json.loads(tags["gate.numbers"])["difference"] < 0

    assert run_in_process("promote", "--rollback", "--reason", "lost the ball") == 0
    assert champion.champion_of(client) == better
    version = client.get_model_version("lorat", worse)
    assert version.tags["rolled_back.note"] == "lost the ball"
    assert f"Version {better} is champion again. lost the ball" in version.description


@pytest.mark.usefixtures("shared_ray")
def test_reference_sets_are_remembered_by_whole_addresses(
    home: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = register(staying_tracker(), "unknown")
    monkeypatch.chdir(Path(uri).parent)
    assert promote(version, data=(Path(uri).name,))
    tags = connect().get_model_version("lorat", version).tags
    assert json.loads(tags["reference_set"]) == [uri]


def test_a_server_that_is_down_is_one_sentence(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert run_in_process("promote", "--rollback") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "start the server" in line


@pytest.mark.exhaustive
@pytest.mark.usefixtures("shared_ray")
def test_equal_candidate_needs_to_be_allowed(home: Path, uri: str) -> None:
    assert promote(register(staying_tracker(), uri))
    twin = register(staying_tracker(), uri)
    candidate = ("promote", "--candidate", f"models:/lorat/{twin}")
    assert run_in_process(*candidate) == 1
    assert run_in_process(*candidate, "--allow-equal") == 0
    assert champion.champion_of(connect()) == twin
    worse = register(shrinking_tracker(), uri)
    candidate = ("promote", "--candidate", f"models:/lorat/{worse}", "--allow-equal")
    assert run_in_process(*candidate) == 1
    assert run_in_process(*candidate, "--force", "--reason", "for the demo") == 0
    assert champion.champion_of(connect()) == worse
    assert connect().get_model_version("lorat", worse).tags["gate.decision"] == "forced"


@pytest.mark.usefixtures("shared_ray")
def test_checkpoint_folder_is_registered_and_promoted(
    home: Path, uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_merged(staying_tracker(), tmp_path / "bundle")
    with caplog.at_level("INFO"):
        assert run_in_process("promote", "--candidate", tmp_path / "bundle", "--data", uri) == 0
    assert "as version 1 of lorat" in caplog.text
    client = connect()
    assert champion.champion_of(client) == "1"
    # It says of its evaluation what a trained version does, though there was nothing to beat.
    version = client.get_model_version("lorat", "1")
    (key,) = (key for key in version.tags if key.endswith("/ao"))
    assert re.match(r"AO 0\.\d{3}, .*N-112", version.description)
    assert f"{float(version.tags[key]):.3f}" in version.description.splitlines()[0]
    assert {f"{key}_low", f"{key}_high"} <= version.tags.keys()
    assert sum(json.loads(version.tags[versions.SCORE_HISTOGRAM])) > 0


@pytest.mark.exhaustive
@pytest.mark.usefixtures("shared_ray")
def test_two_promotions_at_once_end_with_the_better_one(home: Path, uri: str) -> None:
    assert promote(register(shrinking_tracker(), uri))
    a, b = register(staying_tracker(), uri), register(staying_tracker(), uri)
    jobs = [start("promote", "--candidate", f"models:/lorat/{v}") for v in (a, b)]
    outputs = [job.communicate(timeout=800) for job in jobs]
    codes = [job.returncode for job in jobs]
    # The twins are equal: the later one is compared with the earlier one and refused.
    assert sorted(codes) == [0, 1], outputs
    assert champion.champion_of(connect()) == (a, b)[codes.index(0)]


def test_export_writes_a_parity_report(home: Path, uri: str, tmp_path: Path) -> None:
    register(staying_tracker(), uri)
    arguments = ("--model", "models:/lorat@candidate", "--output", tmp_path / "out")
    assert run_in_process("export", *arguments) == 0
    assert "| onnx | model.onnx |" in (tmp_path / "out" / "parity.md").read_text()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "SHA256SUMS", "bundle", "model.onnx", "model.pt2", "official.safetensors", "parity.json",
        "parity.md",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("job", "arguments", "message"),
    [
        ("evaluate", [], "model"),
        ("evaluate", ["--model", "models:/lorat@champion"], "There is no models:/lorat@champion"),
        ("evaluate", ["--model", "static", "--data", "/nowhere"], "There is no dataset at"),
        ("evaluate", ["--model", "static", "--batch-size", "0"], "batch_size is 0"),
        ("evaluate", ["--model", "static", "static"], "static and static are the same tracker"),
        ("evaluate", ["--model", "results:/nowhere"], "There is no /nowhere; give results:FOLDER"),
        ("evaluate", ["--model", "static", "--as", "vot"], "There is no vot for --as; give compat"),
        ("evaluate", ["--model", "static", "mil", "--explain", "a"], "give one of them"),
        ("evaluate", ["--model", "static", "--explain", "/nowhere"], "There is no /nowhere; give"),
        ("promote", [], "There is no models:/lorat@candidate"),
        ("promote", ["--rollback", "--force"], "give one of them"),
        ("export", ["--model", "nowhere"], "There is no model nowhere"),
    ],
)
def test_mistake_is_one_sentence(
    job: str, arguments: list[str], message: str, home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()  # what making the store printed
    assert run_in_process(job, *arguments) == 2
    printed = capfd.readouterr().err.splitlines()
    assert len(printed) == 1, printed
    assert message in printed[0]
