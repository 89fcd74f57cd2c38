"""A name ties a configuration, data and one MLflow run together."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lorat.config.training import LoraConfig, TrainConfig, resolve
from lorat.errors import UserError
from lorat.files.storage import Location, locate
from lorat_platform.runs import record as run_record
from lorat_platform.runs.claim import Lease

CONFIG = resolve(TrainConfig(variant="N-112"))
DATA = {"synthetic": "abc"}


def choose(
    storage: Path,
    name: str | None = None,
    config: TrainConfig = CONFIG,
    data: dict[str, str] = DATA,
    resume: run_record.Resume = "auto",
) -> tuple[str, bool]:
    lease, folder, record, existed = run_record.choose(
        locate(storage), name, config, data, resume, git_revision=None
    )
    with lease:
        record.write(folder)
    return record.name, existed


def finish(storage: Path, name: str) -> None:
    folder = locate(storage / name)
    record = run_record.read(folder)
    assert record is not None
    dataclasses.replace(record, finished=True).write(folder)


def test_the_same_command_goes_on_with_the_unfinished_run(tmp_path: Path) -> None:
    name, existed = choose(tmp_path)
    assert not existed
    assert name.startswith("N-112-")
    assert choose(tmp_path) == (name, True)
    other, existed = choose(tmp_path, config=dataclasses.replace(CONFIG, seed=1))
    assert not existed
    assert other != name


def test_after_a_finished_run_the_same_command_begins_another(tmp_path: Path) -> None:
    name, _ = choose(tmp_path)
    finish(tmp_path, name)
    assert choose(tmp_path) == (f"{name}-2", False)
    assert choose(tmp_path) == (f"{name}-2", True)


def test_a_named_run_is_gone_on_with_only_if_it_is_the_same(tmp_path: Path) -> None:
    choose(tmp_path, "mine")
    assert choose(tmp_path, "mine") == ("mine", True)
    changed = dataclasses.replace(CONFIG, lora=LoraConfig(rank=3))
    with pytest.raises(UserError, match=r"lora.rank = 64, now it is 3"):
        choose(tmp_path, "mine", changed)
    with pytest.raises(UserError, match="other data"):
        choose(tmp_path, "mine", data={"synthetic": "xyz"})
    with pytest.raises(UserError, match="exists"):
        choose(tmp_path, "mine", resume="never")
    finish(tmp_path, "mine")
    with pytest.raises(UserError, match="finished"):
        choose(tmp_path, "mine")


def test_insisting_on_a_run_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no unfinished run"):
        choose(tmp_path, "mine", resume="must")


def test_a_named_run_that_another_driver_has_is_left_alone(tmp_path: Path) -> None:
    choose(tmp_path, "mine")
    with Lease(locate(tmp_path / "mine"), "The run mine", "wait").claim():
        with pytest.raises(UserError, match=f"The run mine is driven by process {os.getpid()}"):
            choose(tmp_path, "mine")
        assert choose(tmp_path, "other") == ("other", False)
    assert choose(tmp_path, "mine") == ("mine", True)


def test_drivers_that_start_at_once_without_a_name_take_different_runs(tmp_path: Path) -> None:
    for number in range(20):
        storage = locate(tmp_path / str(number))
        barrier = threading.Barrier(2)

        def start(
            storage: Location = storage, barrier: threading.Barrier = barrier
        ) -> tuple[Lease, str]:
            barrier.wait()
            lease, folder, record, _ = run_record.choose(storage, None, CONFIG, DATA, "auto", None)
            record.write(folder)
            return lease, record.name

        with ThreadPoolExecutor(2) as pool:
            both = [future.result() for future in [pool.submit(start) for _ in range(2)]]
        assert len({name for _, name in both}) == 2
        for lease, _ in both:
            lease.release()


def test_a_run_that_was_finished_while_its_driver_was_waited_for_is_not_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, _ = choose(tmp_path)
    claim = Lease.claim

    def late(lease: Lease, *, patient: bool = False) -> Lease:
        monkeypatch.undo()
        finish(tmp_path, name)
        return claim(lease, patient=patient)

    monkeypatch.setattr(Lease, "claim", late)
    assert choose(tmp_path) == (f"{name}-2", False)


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        choose(tmp_path / "file")


@pytest.mark.parametrize("name", ["../../elsewhere", "/tmp/elsewhere", "other", ""])
def test_a_record_that_names_another_folder_is_refused(tmp_path: Path, name: str) -> None:
    choose(tmp_path, "mine")
    file = tmp_path / "mine" / run_record.FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | {"name": name}))
    with pytest.raises(UserError, match="holds the record of a run"):
        choose(tmp_path, "mine")
