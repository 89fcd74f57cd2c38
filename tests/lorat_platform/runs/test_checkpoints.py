"""A checkpoint is complete or absent, whatever happens while it is written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from lorat.errors import UserError
from lorat.files import scratch
from lorat.files.storage import Location, locate
from lorat_platform.runs import checkpoints
from lorat_platform.runs.checkpoints import MANIFEST, SNAPSHOT
from tests.object_store import KEYS, object_store


@pytest.fixture
def local(tmp_path: Path) -> Path:
    folder = tmp_path / "local"
    (folder / "adapter").mkdir(parents=True)
    (folder / "head.safetensors").write_bytes(b"h" * 1000)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"a" * 2000)
    return folder


def test_an_uploaded_checkpoint_is_complete_and_the_newest(tmp_path: Path, local: Path) -> None:
    run = locate(tmp_path / "run")
    run.make()
    assert checkpoints.newest(run) is None
    for step in (20, 100, 40):
        checkpoints.upload(local, run, checkpoints.name_of(step))
    assert checkpoints.newest(run) == "step-00000100"
    assert checkpoints.names(run) == ["step-00000020", "step-00000040", "step-00000100"]
    assert checkpoints.step_of("step-00000100") == 100


@pytest.mark.parametrize("damage", ["cut", "missing", "no manifest", "half manifest"])
def test_an_incomplete_folder_is_no_checkpoint(tmp_path: Path, local: Path, damage: str) -> None:
    run = locate(tmp_path / "run")
    run.make()
    checkpoints.upload(local, run, "step-00000020")
    checkpoints.upload(local, run, "step-00000040")
    broken = tmp_path / "run" / "step-00000040"
    if damage == "cut":
        (broken / "head.safetensors").write_bytes(b"h")
    elif damage == "missing":
        (broken / "head.safetensors").unlink()
    elif damage == "no manifest":
        (broken / MANIFEST).unlink()
    else:
        (broken / MANIFEST).write_text('{"files": {"head')
    assert checkpoints.newest(run) == "step-00000020"
    checkpoints.upload(local, run, "step-00000040")
    assert checkpoints.newest(run) == "step-00000040"


def test_a_full_disk_is_said_and_leaves_the_last_checkpoint_intact(
    tmp_path: Path, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = locate(tmp_path / "run")
    run.make()
    checkpoints.upload(local, run, "step-00000020")

    def full(source: object, target: Path) -> None:
        Path(target).mkdir()
        (Path(target) / "head.safetensors").write_bytes(b"h" * 10)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(UserError, match="No space left on device; step-00000020 is intact"):
        checkpoints.upload(local, run, "step-00000040")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["step-00000020"]


def test_an_unreachable_store_is_said_and_leaves_the_last_checkpoint_intact(
    local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    with object_store() as store:
        run = locate(store.uri("run"))
        checkpoints.upload(local, run, "step-00000020")
        assert checkpoints.newest(run) == "step-00000020"
        store.pause()
        with pytest.raises(UserError, match=r"step-00000040 cannot be written .* is intact"):
            checkpoints.upload(local, run, "step-00000040")
        store.resume()
        assert checkpoints.names(run) == ["step-00000020"]
        checkpoints.upload(local, run, "step-00000040")
        assert checkpoints.newest(run) == "step-00000040"


def test_a_damaged_list_of_checkpoints_is_dropped_and_a_good_one_kept(
    tmp_path: Path, local: Path
) -> None:
    run = locate(tmp_path / "run")
    run.make()
    checkpoints.upload(local, run, "step-00000020")
    snapshot = tmp_path / "run" / SNAPSHOT
    entry = {"checkpoint_dir_name": "step-00000020", "metrics": {"val/ao": 0.5}}
    snapshot.write_text(json.dumps({"checkpoint_results": [entry]}))
    checkpoints.repair(run)
    assert checkpoints.registered(run) == {"step-00000020": {"val/ao": 0.5}}
    for content in ("", '{"checkpoint_results": [', json.dumps({"checkpoint_results": [
        entry | {"checkpoint_dir_name": "step-00000099"}]})):  # fmt: skip
        snapshot.write_text(content)
        (tmp_path / "run" / ".part-step-00000040").mkdir()
        checkpoints.repair(run)
        assert not snapshot.exists()
        assert not (tmp_path / "run" / ".part-step-00000040").exists()
    assert checkpoints.newest(run) == "step-00000020"


def upload_three(run: Location, local: Path) -> None:
    for step in (20, 40, 60):
        checkpoints.upload(local, run, checkpoints.name_of(step))


@pytest.mark.parametrize("what", ["manifest", "file", "all but the manifest"])
def test_what_a_kill_left_of_a_deletion_is_removed(tmp_path: Path, local: Path, what: str) -> None:
    run = locate(tmp_path / "run")
    run.make()
    upload_three(run, local)
    half = tmp_path / "run" / "step-00000020"
    for path in [path for path in half.rglob("*") if path.is_file()]:
        keeps = {"manifest": path.name != MANIFEST, "file": path.parent == half}
        if not keeps.get(what, path.name == MANIFEST):
            path.unlink()
    assert checkpoints.parts(run) == ["step-00000020"]
    checkpoints.repair(run)
    assert not half.exists()
    assert checkpoints.names(run) == ["step-00000040", "step-00000060"]


def test_a_damaged_checkpoint_with_all_its_files_is_left_to_its_owner(
    tmp_path: Path, local: Path
) -> None:
    run = locate(tmp_path / "run")
    run.make()
    upload_three(run, local)
    for content in (b"\xff\x00", b"[]", b'{"files": 3}', b'{"files": {"../x": 1}}'):
        (tmp_path / "run" / "step-00000020" / MANIFEST).write_bytes(content)
        checkpoints.repair(run)
        assert (tmp_path / "run" / "step-00000020").exists()


def test_a_deletion_that_is_killed_leaves_no_half_checkpoint_in_view(
    tmp_path: Path, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = locate(tmp_path / "run")
    run.make()
    upload_three(run, local)

    def killed(path: Path) -> None:
        (path / "head.safetensors").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.delete(run, "step-00000020")
    assert checkpoints.names(run) == ["step-00000040", "step-00000060"]
    assert not checkpoints.parts(run)
    (left,) = (tmp_path / "run").glob(".deleted-*")
    gone = scratch.Process(scratch.machine(), os.getpid(), "1").mark()  # the process is dead by now
    left.rename(left.with_name(f".deleted-step-00000020{gone}abc"))
    checkpoints.repair(run)
    assert not list((tmp_path / "run").glob(".deleted-*"))


def test_what_a_kill_left_of_a_deletion_in_an_object_store_is_removed(
    local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAT_HOME", str(tmp_path))
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    with object_store() as store:
        run = locate(store.uri("run"))
        upload_three(run, local)

        def killed(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Location, "delete_folder", killed)
            with pytest.raises(KeyboardInterrupt):
                checkpoints.delete(run, "step-00000020")
        assert run.exists("step-00000020")
        assert checkpoints.names(run) == ["step-00000040", "step-00000060"]
        checkpoints.repair(run)
        assert not run.exists("step-00000020")
        assert checkpoints.names(run) == ["step-00000040", "step-00000060"]
