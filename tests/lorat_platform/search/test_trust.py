"""A search's folder, from which code runs, is only believed where nobody else can have written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from lorat.config.training import TrainConfig
from lorat.errors import UserError
from lorat.files.storage import Location, locate
from lorat_platform.search.driver import resume_search
from lorat_platform.search.plan import REQUEST_FILE, SearchOptions, make_plan, read_plan
from lorat_platform.search.trust import check_trusted, note_origin
from tests.jobs.in_process import run_in_process


class RunsCode:
    """What becomes a call when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.mark,)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a search of ours in a storage of ours."""
    import pickle

    monkeypatch.setenv("LORAT_HOME", str(tmp_path / "home"))
    folder = tmp_path / "runs" / "mine"
    (folder / "trial-1").mkdir(parents=True)
    plan = make_plan(TrainConfig(variant="N-112"), SearchOptions(name="mine"))
    (folder / REQUEST_FILE).write_text(json.dumps(plan.request()))
    for name in ("tuner.pkl", "trial-1/error.pkl"):
        (folder / name).write_bytes(pickle.dumps(RunsCode(tmp_path / "ran")))
    return folder


def chmod(mode: int, name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).chmod(mode)


def link(name: str) -> Callable[[Path], None]:
    def replace(folder: Path) -> None:
        moved = folder.parent.parent / "moved"
        (folder / name).rename(moved)
        (folder / name).symlink_to(moved)

    return replace


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (chmod(0o777, ""), "others can write to .*mine "),
        (chmod(0o775, ""), "others can write to .*mine "),
        (chmod(0o777, ".."), "others can write to .*runs "),
        (chmod(0o666, "tuner.pkl"), "others can write to .*tuner.pkl "),
        (chmod(0o664, "trial-1/error.pkl"), "others can write to .*error.pkl "),
        (chmod(0o777, "trial-1"), "others can write to .*trial-1 "),
        (link("tuner.pkl"), "tuner.pkl is a link"),
        (link("trial-1"), "trial-1 is a link"),
        (link(""), "mine is a link"),
    ],
)
def test_a_local_folder_that_others_can_write_to_is_refused(
    folder: Path, tmp_path: Path, change: Callable[[Path], None], problem: str
) -> None:
    storage = str(folder.parent)
    assert read_plan("mine", storage).name == "mine"
    change(folder)
    with pytest.raises(UserError, match=rf"{problem}.*--trust-search-folder"):
        resume_search("mine", storage)
    assert read_plan("mine", storage, trust_folder=True).name == "mine"
    assert not (tmp_path / "ran").exists()


def test_the_option_of_the_job_goes_on_nevertheless(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.chmod(0o777)
    flags = ("--resume", "mine", "--storage", folder.parent, "--dry-run")
    assert run_in_process("tune", *flags) == 2
    assert "others can write" in capsys.readouterr().err
    assert run_in_process("tune", *flags, "--trust-search-folder") == 0


def test_a_folder_of_another_user_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    with pytest.raises(UserError, match=r"belongs to the user .*--trust-search-folder"):
        read_plan("mine", str(folder.parent))


def test_a_sticky_storage_as_tmp_is_believed(folder: Path) -> None:
    folder.parent.chmod(0o1777)
    assert read_plan("mine", str(folder.parent)).name == "mine"


@pytest.mark.parametrize("name", ["../mine", "..", "a/mine", "", "."])
def test_a_name_that_leads_elsewhere_is_no_search(folder: Path, name: str) -> None:
    with pytest.raises(UserError, match="There is no search"):
        read_plan(name, str(folder.parent))


def test_an_object_store_is_believed_where_it_is_the_environments_or_was_begun_here(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def search(uri: str) -> Location:
        return Location(uri, pafs.SubTreeFileSystem(str(folder), pafs.LocalFileSystem()), "mine")

    monkeypatch.delenv("LORAT_STORAGE", raising=False)
    given = search("s3://bucket/runs/mine?scheme=http")
    with pytest.raises(UserError, match=r"LORAT_STORAGE.*--trust-search-folder"):
        check_trusted("mine", given)
    monkeypatch.setenv("LORAT_STORAGE", "s3://bucket/runs/?scheme=http")
    check_trusted("mine", given)
    with pytest.raises(UserError, match="neither in the storage"):
        check_trusted("mine", search("s3://other/runs/mine?scheme=http"))
    monkeypatch.delenv("LORAT_STORAGE")
    note_origin("mine", given)
    check_trusted("mine", given)
    with pytest.raises(UserError, match="neither in the storage"):
        check_trusted("mine", search("s3://other/runs/mine?scheme=http"))
    with pytest.raises(UserError, match="neither in the storage"):
        check_trusted("other", search("s3://bucket/runs/other?scheme=http"))


def test_the_storage_of_the_environment_is_the_default(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAT_STORAGE", str(folder.parent))
    assert read_plan("mine").storage == str(locate(folder.parent).path)


def test_two_searches_of_one_name_do_not_share_a_folder_of_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAT_HOME", str(tmp_path / "home"))
    note_origin("mine", locate(tmp_path / "one" / "mine"))
    note_origin("mine", locate(tmp_path / "one" / "mine"))
    with pytest.raises(UserError, match=r"results of the search mine in .*one.*another --name"):
        note_origin("mine", locate(tmp_path / "two" / "mine"))
