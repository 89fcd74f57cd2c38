"""No damage of a JSON file of ours gives anything but a sentence, and no resume is lost to it."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorat import checkpoint
from lorat.checkpoint.training_state import read_step
from lorat.config.fields import to_dict
from lorat.config.training import TrainConfig, resolve
from lorat.data.shards.frame_index import FrameIndex
from lorat.data.shards.from_memory import write_dataset
from lorat.data.shards.manifest import read_manifest
from lorat.errors import UserError
from lorat.files import storage
from lorat.files.scratch import Process
from lorat.learning.optimisation import build_optimizer
from lorat.learning.replay import replay
from lorat.tracking.one_pass import SequenceResult
from lorat_platform.data import ingestion
from lorat_platform.evaluation.sets import _Store
from lorat_platform.evaluation.subject import load_subject
from lorat_platform.evaluation.workers import Conditions
from lorat_platform.recording import backlog
from lorat_platform.recording.journal import Journal
from lorat_platform.runs import checkpoints, claim
from lorat_platform.runs import record as run_record
from lorat_platform.search import plan
from lorat_platform.search.trial.single import STATE_FILE, read_progress
from tests.jobs.in_process import import_job
from tests.lorat.small_sets import tracks
from tests.lorat.tiny_models import tiny_config, tiny_model

NUM_DAMAGED = 300
"""Damaged texts per reader."""
SCALARS: tuple[Any, ...] = (
    None, True, 0, -1, 2**63, 10**30, 1.5, float("nan"), float("inf"), "", "../../x", "/etc/passwd",
    "a\x00b", "\ud800", [], {}, [[]], {"a": {}}, "x" * 5000, [None] * 50,
)  # fmt: skip


train_job = import_job("train")


def refusal(read: Callable[[], Any]) -> str | None:
    """Return the sentence of a reader that refuses, none of one that does not."""
    try:
        read()
    except UserError as error:
        return str(error)
    return None


def is_sentence(text: str | None) -> bool:
    """Tell whether a refusal fits on some lines of a terminal; none does."""
    return text is None or ("\n" not in text and len(text) < 1500)


def damaged(text: bytes, rng: random.Random) -> bytes:
    """Return the text with damage of a random kind."""
    kind = rng.randrange(8)
    if kind == 0:
        return text[: rng.randrange(len(text))]
    if kind == 1:
        position = rng.randrange(len(text))
        flipped = text[position] ^ 1 << rng.randrange(8)
        return text[:position] + bytes([flipped]) + text[position + 1 :]
    if kind == 2:
        return rng.randbytes(rng.randrange(200))
    if kind == 3:
        deep = rng.choice((100, 100_000))
        return rng.choice((b"[" * deep, b'{"files":' * deep, b"[" * 100 + b"]" * 100))
    if kind == 4:
        return text.decode().encode(rng.choice(("utf-16", "utf-32", "utf-8-sig")))
    value = json.loads(text)
    for _ in range(rng.randrange(1, 4)):
        value = _changed(value, rng)
    return json.dumps(value).encode()


def _changed(value: Any, rng: random.Random) -> Any:
    """Return a JSON value with one place of it replaced, removed or added."""
    if rng.random() < 0.3 or not isinstance(value, dict | list) or not value:
        return rng.choice(SCALARS)
    if isinstance(value, list):
        position = rng.randrange(len(value))
        return [*value[:position], _changed(value[position], rng), *value[position + 1 :]]
    key = rng.choice(list(value))
    if rng.random() < 0.2:
        return {k: v for k, v in value.items() if k != key}
    return value | {rng.choice((key, key, key, "new")): _changed(value[key], rng)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an undamaged file of every kind."""

    place = tmp_path_factory.mktemp("files")
    config = resolve(tiny_config())
    model = tiny_model()
    checkpoint.save(model, config, place / "checkpoint")
    checkpoint.save_training_state(
        place / "checkpoint", model, build_optimizer(model, config), step=3
    )
    progress = read_progress(None).to_dict()
    (place / "checkpoint" / STATE_FILE).write_text(json.dumps(progress))
    checkpoint.save_merged(model, place / "bundle")
    for made in ("checkpoint", "bundle"):
        (place / made / "SHA256SUMS").unlink(missing_ok=True)  # as an earlier version wrote them
    write_dataset(str(place / "set"), tracks())
    location = storage.locate(place / "run")
    record = run_record.RunRecord(
        name="run", config=to_dict(config), data={"a": "b"}, created="2026", results={"ao": 0.5}
    )
    record.write(location)
    driver = claim.Announcement(token="0" * 16, host="h", process=Process.here(), began=1.0)
    location.write_bytes(DRIVER, driver.to_bytes())
    checkpoints.upload(place / "checkpoint", location, "step-00000003")
    entry = {"checkpoint_dir_name": "step-00000003", "metrics": {"loss": 1.0}}
    location.write_bytes(checkpoints.SNAPSHOT, json.dumps({"checkpoint_results": [entry]}).encode())
    request = {
        "identity": "0123456789abcdef",
        "options": {"trials": 2, "space": ["head.depth=2"]},
        "config": to_dict(dataclasses.replace(config, data="synthetic")),
        "space": [
            {"path": "lr", "kind": "loguniform", "values": [1e-4, 1e-2]},
            {"path": "lora.rank", "kind": "choice", "values": [4, 8]},
        ],
    }
    location.write_bytes(plan.REQUEST_FILE, json.dumps(request).encode())
    location.write_bytes(ingestion.REPORT, b'{"findings": [{"sequence": "a", "action": "kept", '
                         b'"why": "so", "frames": [1, 2]}]}')  # fmt: skip
    journal = Journal(place / "journal")
    journal.set_header(
        key="k", run_id="r", experiment="e", name="n", parent=None, start_ms=5,
        tracking_uri="sqlite:////x", store="s",
    )  # fmt: skip
    journal.append({"op": "metrics", "time_ms": 1, "step": 2, "values": {"loss": float("nan")}})
    journal.deliver_to(1)
    journal.set_postponed([{"op": "artifact", "time_ms": 1, "staged": "a/b", "folder": None}])
    journal.reject({"op": "tags", "time_ms": 1, "values": {"a": "b"}}, "so")
    dump = {"step": 1, "rank": 0, "pairs": [1], "precision": "float32"}
    (place / "dump.json").write_text(json.dumps(dump))
    return place


DRIVER = f"driver-{'0' * 16}.json"

READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "config": ("checkpoint/config.json", lambda f: checkpoint.load(f / "checkpoint")),
    "job": (
        "checkpoint/config.json",
        lambda f: train_job.read_config(f / "checkpoint/config.json"),
    ),
    "bundle": ("bundle/config.json", lambda f: checkpoint.load(f / "bundle")),
    "state": ("checkpoint/training_state.json", lambda f: read_step(f / "checkpoint")),
    "trial": (f"checkpoint/{STATE_FILE}", lambda f: read_progress(f / "checkpoint")),
    "manifest": ("set/dataset.json", lambda f: read_manifest(storage.locate(f / "set"))),
    "run": ("run/run.json", lambda f: run_record.read(storage.locate(f / "run"))),
    "driver": (f"run/{DRIVER}", lambda f: claim.announcements(storage.locate(f / "run"))),
    "complete": (
        "run/step-00000003/complete.json",
        lambda f: checkpoints.newest(storage.locate(f / "run")),
    ),
    "snapshot": (
        f"run/{checkpoints.SNAPSHOT}",
        lambda f: checkpoints.registered(storage.locate(f / "run")),
    ),
    "search": ("run/search.json", lambda f: plan.read_plan("run", str(f))),
    "report": ("run/report.json", lambda f: ingestion.read_report(str(f / "run"))),
    "header": ("journal/run.json", lambda f: Journal(f / "journal").header()),
    "replayed": ("journal/run.json", lambda f: backlog.replay(f / "journal")),
    "records": ("journal/journal.jsonl", lambda f: Journal(f / "journal").read(9)),
    "delivered": ("journal/delivered.json", lambda f: Journal(f / "journal").read(9)),
    "postponed": ("journal/postponed.json", lambda f: Journal(f / "journal").postponed()),
    "rejected": ("journal/rejected.jsonl", lambda f: Journal(f / "journal").take_up_rejected()),
    "dump": ("dump.json", lambda f: replay(str(f))),
}
"""File and what reads it, by name."""


@pytest.fixture
def restored(folder: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """Return the file of a reader, which is as it was afterwards."""
    file = folder / READERS[request.param][0]
    before = file.read_bytes()
    yield file
    file.write_bytes(before)


@pytest.mark.parametrize(("restored", "reader"), [(n, n) for n in READERS], indirect=["restored"])
def test_a_damaged_file_is_used_or_refused_in_one_sentence(
    folder: Path, restored: Path, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(reader)
    text, read = restored.read_bytes(), READERS[reader][1]
    num = 40 if reader in ("config", "bundle") else NUM_DAMAGED
    num_refused = 0
    for _ in range(num):
        restored.write_bytes(damaged(text, rng))
        told = refusal(lambda: read(folder))
        assert is_sentence(told)
        num_refused += told is not None
    assert num_refused > num // 4 or reader in ("driver", "complete", "records", "rejected", "dump")


def test_a_damaged_list_of_files_makes_a_checkpoint_absent_and_the_resume_go_on(
    folder: Path, tmp_path: Path
) -> None:
    run = storage.locate(tmp_path / "run")
    for step in (3, 6):
        checkpoints.upload(folder / "checkpoint", run, checkpoints.name_of(step))
    mark = tmp_path / "run" / "step-00000006" / "complete.json"
    rng, text = random.Random(0), mark.read_bytes()
    for _ in range(NUM_DAMAGED):
        mark.write_bytes(damaged(text, rng))
        assert checkpoints.newest(run) in ("step-00000003", "step-00000006")
    for wrong in (b"", b"{}", b"[]", b"null", b'{"files": {"../../x": 1}}', b"[" * 100_000,
                  b"\xff\xfe", b'{"files": {"a": "b"}}', b'{"files": {"a": 1e999}}'):  # fmt: skip
        mark.write_bytes(wrong)
        assert checkpoints.newest(run) == "step-00000003"
    mark.unlink()
    mark.mkdir()
    assert checkpoints.newest(run) == "step-00000003"


def test_a_damaged_snapshot_is_made_anew(folder: Path, tmp_path: Path) -> None:
    run = storage.locate(tmp_path)
    for wrong in (b"", b"[]", b"[" * 100_000, b'{"checkpoint_results": [{"metrics": {}}]}'):
        run.write_bytes(checkpoints.SNAPSHOT, wrong)
        checkpoints.repair(run)
        assert not run.exists(checkpoints.SNAPSHOT)


def test_a_configuration_with_any_value_is_used_or_refused_in_one_sentence(tmp_path: Path) -> None:
    file, rng = tmp_path / "config.json", random.Random(1)
    text = json.dumps(to_dict(resolve(TrainConfig()))).encode()
    for _ in range(2 * NUM_DAMAGED):
        file.write_bytes(damaged(text, rng))
        assert is_sentence(refusal(lambda: resolve(train_job.read_config(file))))


def test_a_damaged_result_of_a_sequence_is_tracked_again(folder: Path, tmp_path: Path) -> None:
    index = FrameIndex.open(folder / "set")
    store = _Store(load_subject("static"), index, "cpu", tmp_path)
    result = SequenceResult(
        track=0, name=index.sequence(0), boxes=np.ones((3, 4)), scores=np.ones(3),
        seconds=np.ones(3), decode_seconds=np.ones(3),
    )  # fmt: skip
    store.save(result, Conditions(batch=1, threads=1, host="a"))
    file = store._file(0)
    written, rng = file.read_bytes(), random.Random(2)
    assert store.load([0, 1]).keys() == {0}
    num_again = 0
    for _ in range(NUM_DAMAGED):
        place = rng.randrange(len(written))
        cut = written[:place] if rng.random() < 0.3 else written[:place] + rng.randbytes(1)
        file.write_bytes(cut + (b"" if len(cut) == place else written[place + 1 :]))
        num_again += not store.load([0])
    assert num_again > NUM_DAMAGED // 2
