"""Registered trackers load anywhere, without this repository and without pickle."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from lorat.checkpoint.folder import save
from lorat.config.tracking import TrackingConfig
from lorat.config.training import TrainConfig
from lorat.errors import UserError
from lorat.files.storage import locate
from lorat.model.network import build_model
from lorat.tracking.tracker import Tracker
from lorat_platform.recording.run import open_run
from lorat_platform.recording.store import connect
from lorat_platform.registry import versions
from lorat_platform.registry.package import input_example
from lorat_platform.runs import checkpoints
from tests.constant_trackers import random_tracker
from tests.mlflow_home import make_home
from tests.object_store import KEYS, object_store

pytestmark = pytest.mark.processes(minutes=0.5)

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        folder = make_home(tmp_path_factory.mktemp("registry") / "home")
        patch.setenv("LORAT_HOME", str(folder))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield folder


@pytest.fixture(scope="module")
def registered(home: Path) -> dict[str, str]:
    model = random_tracker()
    model.tracking = TrackingConfig(window_penalty=0.125)
    with open_run("lorat", "training") as run:
        version = versions.register(
            model,
            run_id=run.wait_for_id(),
            datasets={"got10k-train": "0123abcd"},
            scores={"val/ao": 0.6123},
            reference_set=["/data/val"],
            git_revision="deadbeef",
        )
    return {"run_id": run.wait_for_id(), "version": version}


def files_of(version: str) -> Path:
    source = connect().get_model_version("lorat", version).source
    return Path(source.removeprefix("file://"))


def test_version_has_alias_and_tags(registered: dict[str, str]) -> None:
    version = connect().get_model_version_by_alias("lorat", "candidate")
    assert str(version.version) == registered["version"]
    assert version.run_id == registered["run_id"]
    assert version.tags.pop("model_id").startswith("m-")
    assert version.tags == {
        "variant": "N-112",
        "tracking.window_penalty": "0.125",
        "dataset.got10k-train": "0123abcd",
        "score.val/ao": "0.6123",
        "reference_set": '["/data/val"]',
        "git_revision": "deadbeef",
    }
    assert "mlflow.pyfunc.load_model" in version.description


def test_a_list_of_versions_shows_the_scores(registered: dict[str, str]) -> None:
    version = connect().get_model_version("lorat", registered["version"])
    assert version.description.startswith("AO 0.612 (val). N-112. ")
    scores = {"eval/a/ao": 0.5, "eval/a/sr50": 0.6, "eval/b/ao": 0.25}
    assert versions.headline(scores) == "AO 0.500, SR50 0.600 (a); AO 0.250 (b)"


def test_no_file_is_a_pickle(registered: dict[str, str]) -> None:
    files = [path for path in files_of(registered["version"]).rglob("*") if path.is_file()]
    assert any(path.name == "model.safetensors" for path in files)
    allowed = {".py", ".txt", ".yaml", ".json", ".safetensors", ""}
    assert {path.suffix for path in files} <= allowed
    for path in files:
        start = path.read_bytes()[:4]
        assert not start.startswith((b"\x80", b"PK\x03\x04")), f"{path} is a pickle or a zip"
    assert {path.name for path in files if path.suffix == ""} == {"MLmodel", "SHA256SUMS"}


def test_requirements_are_pinned_and_signature_and_example_are_there(
    registered: dict[str, str],
) -> None:
    folder = files_of(registered["version"])
    requirements = (folder / "requirements.txt").read_text().splitlines()
    assert all("==" in line for line in requirements)
    assert f"timm=={importlib.metadata.version('timm')}" in requirements
    from mlflow.models import Model

    model = Model.load(str(folder / "MLmodel"))
    assert model.signature.inputs.input_names() == ["frames", "box"]
    assert model.signature.outputs.input_names() == ["x1", "y1", "x2", "y2", "score"]
    assert model.load_input_example(str(folder))["frames"].shape == (3, 32, 48, 3)


CLEAN = """
import importlib.abc, json, sys

root, uri, video = sys.argv[1:]
sys.path[:] = [entry for entry in sys.path if entry not in {"", root, root + "/platform"}]

class NotRequired(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"peft", "ray", "tyro", "optuna", "lorat_platform", "av"}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NotRequired())
import mlflow
import numpy as np

data = np.load(video)
model = mlflow.pyfunc.load_model(uri)
table = model.predict({"frames": data["frames"], "box": data["box"]})
import lorat
assert not lorat.__file__.startswith(root + "/lorat"), lorat.__file__
print(json.dumps([list(table.columns), table.to_numpy().tolist()]))
"""


def check_clean_process(uri: str, home: Path, tmp_path: Path) -> None:
    """Track with ``mlflow.pyfunc`` alone, and find the same with the model as the jobs load it."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (4, 60, 80, 3)).astype(np.uint8)
    box = np.array([20.0, 15.0, 50.0, 45.0])
    np.savez(tmp_path / "video.npz", frames=frames, box=box)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "LORAT"))}
    environment |= {
        "MLFLOW_TRACKING_URI": f"sqlite:///{home}/mlflow.db",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    }
    result = subprocess.run(
        [sys.executable, "-c", CLEAN, str(ROOT), uri, tmp_path / "video.npz"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr
    columns, rows = json.loads(result.stdout.splitlines()[-1])
    assert columns == ["x1", "y1", "x2", "y2", "score"]
    assert rows[0] == [*box, 1.0]
    tracker = Tracker(versions.load(uri))
    tracker.init(frames[0], box)
    for frame, row in zip(frames[1:], rows[1:], strict=True):
        found, score = tracker.update(frame)
        assert np.allclose(row, [*found, score], atol=1e-3)


def test_clean_process_without_the_repository_tracks_a_video(
    registered: dict[str, str], home: Path, tmp_path: Path
) -> None:
    connect().set_registered_model_alias("lorat", "champion", registered["version"])
    check_clean_process("models:/lorat@champion", home, tmp_path)


def test_a_model_registered_before_modules_moved_into_rooms_still_tracks(
    home: Path, tmp_path: Path
) -> None:
    """Its artefact holds the code of then, such as ``lorat/model.py``; the weights are random."""
    with tarfile.open(Path(__file__).with_name("model_of_flat_modules.tar.xz")) as archive:
        archive.extractall(tmp_path, filter="data")
    client = connect()
    client.create_registered_model("old")
    source = (tmp_path / "model").as_uri()
    version = client.create_model_version("old", source=source).version
    check_clean_process(f"models:/old/{version}", home, tmp_path)


def test_input_example_runs_through_the_signature(registered: dict[str, str]) -> None:
    import mlflow

    model = mlflow.pyfunc.load_model(str(files_of(registered["version"])))
    table = model.predict(input_example())
    assert table.shape == (3, 5)
    x1, y1, x2, y2 = input_example()["box"]
    sides = input_example() | {"box": np.array([x1, y1, x2 - x1, y2 - y1])}
    assert model.predict(sides, params={"box_form": "ltwh"}).equals(table)
    with pytest.raises(UserError, match="give xyxy or ltwh"):
        model.predict(sides, params={"box_form": "cxcywh"})
    with pytest.raises(mlflow.MlflowException, match="box"):
        model.predict({"frames": input_example()["frames"]})


@pytest.mark.parametrize("form", ["alias", "version", "run", "run/model", "model id", "download"])
def test_every_name_of_a_model_gives_the_same_weights(
    form: str, registered: dict[str, str], tmp_path: Path
) -> None:
    model_id = connect().get_model_version("lorat", registered["version"]).tags["model_id"]
    uri = {
        "alias": "models:/lorat@candidate",
        "version": f"models:/lorat/{registered['version']}",
        "run": f"runs:/{registered['run_id']}",
        "run/model": f"runs:/{registered['run_id']}/model",
        "model id": f"models:/{model_id}",
        "download": str(files_of(registered["version"])),
    }[form]
    found = versions.load(uri).state_dict()
    for name, value in random_tracker().merge().state_dict().items():
        assert torch.equal(found[name], value), name


def test_a_damaged_file_of_a_registered_model_is_refused(
    registered: dict[str, str], home: Path
) -> None:
    uri = f"models:/lorat/{registered['version']}"
    expected = {n: v.clone() for n, v in versions.load(uri).state_dict().items()}  # no file's map
    copy = Path(versions.resolve(uri))
    flip_a_bit(copy / "model.safetensors")
    for name, value in versions.load(uri).state_dict().items():  # the copy was fetched anew
        assert torch.equal(value, expected[name])
    stored = files_of(registered["version"]) / "artifacts" / "bundle"
    for file in stored.iterdir():
        written = file.read_bytes()
        flip_a_bit(file)
        shutil.rmtree(copy)
        with pytest.raises(UserError, match="is damaged"):
            versions.load(uri)
        file.write_bytes(written)
    shutil.rmtree(copy)
    versions.load(uri)


def flip_a_bit(file: Path) -> None:
    content = file.read_bytes()
    middle = len(content) // 2
    file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


def test_checkpoint_folder_is_loaded_with_its_adapters(tmp_path: Path) -> None:
    config = TrainConfig(variant="N-112", backbone="none")
    model = build_model(config)
    save(model, config, tmp_path / "checkpoint")
    found = versions.load(tmp_path / "checkpoint")
    assert found.lora is not None
    assert torch.equal(found.head.state_dict()["cls_mlp.layers.0.weight"],
                       model.head.state_dict()["cls_mlp.layers.0.weight"])  # fmt: skip


def test_checkpoint_in_an_object_store_is_fetched_once(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    config = TrainConfig(variant="N-112", backbone="none")
    model = build_model(config)
    save(model, config, tmp_path / "checkpoint")
    with object_store() as store:
        run = locate(store.uri("run"))
        checkpoints.upload(tmp_path / "checkpoint", run, "step-00000020")
        uri = run.child("step-00000020").uri
        found = versions.load(uri)
        assert versions.resolve(uri) == versions.resolve(uri)
        with pytest.raises(UserError, match="There is no checkpoint at s3://"):
            versions.resolve(run.child("step-00000040").uri)
    assert torch.equal(found.head.state_dict()["cls_mlp.layers.0.weight"],
                       model.head.state_dict()["cls_mlp.layers.0.weight"])  # fmt: skip


def test_where_no_model_is_named_the_champion_counts_and_else_the_candidate(
    registered: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    uri = f"models:/lorat/{registered['version']}"
    client = connect()
    before = client.get_registered_model("lorat").aliases.get(versions.CHAMPION)
    if before:  # another test's
        client.delete_registered_model_alias("lorat", versions.CHAMPION)
    assert versions.usual() == uri
    assert caplog.messages[-1] == f"model       {uri}, the candidate; there is no champion yet"
    source = client.get_model_version("lorat", registered["version"]).source
    later = client.create_model_version("lorat", source=source).version
    client.set_registered_model_alias("lorat", versions.CHAMPION, later)
    try:
        assert versions.usual() == f"models:/lorat/{later}"
        assert caplog.messages[-1] == f"model       models:/lorat/{later}, the champion"
    finally:
        client.delete_registered_model_alias("lorat", versions.CHAMPION)
        client.delete_model_version("lorat", later)
        if before:
            client.set_registered_model_alias("lorat", versions.CHAMPION, before)


def test_an_alias_is_pinned_to_the_version_that_it_means_now(registered: dict[str, str]) -> None:
    version = f"models:/lorat/{registered['version']}"
    assert versions.pinned("models:/lorat@candidate") == version
    for fixed in (version, f"runs:/{registered['run_id']}/model", "/checkpoints/a"):
        assert versions.pinned(fixed) == fixed


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("models:/lorat@nobody", "There is no models:/lorat@nobody in MLflow"),
        ("models:/lorat/999", "There is no models:/lorat/999 in MLflow"),
        ("models:/other@champion", "There is no models:/other@champion"),
        ("models:/lorat", "give models:/NAME@ALIAS or models:/NAME/VERSION"),
        ("runs:/0123456789abcdef0123456789abcdef/model", "There is no runs:/"),
        ("/nowhere", "There is no model /nowhere"),
    ],
)
def test_missing_model_is_one_sentence(uri: str, message: str, registered: dict[str, str]) -> None:
    with pytest.raises(UserError, match=message):
        versions.resolve(uri)


def test_registered_files_are_for_whom_the_umask_says(registered: dict[str, str]) -> None:
    umask = os.umask(0)
    os.umask(umask)
    fetched = versions.resolve(f"models:/lorat/{registered['version']}")
    for folder in (files_of(registered["version"]), fetched):
        paths = [folder, *folder.rglob("*")]
        assert "model.safetensors" in {path.name for path in paths}
        for path in paths:
            whole = 0o777 if path.is_dir() else 0o666
            assert path.stat().st_mode & 0o777 == whole & ~umask, path


def test_a_moved_home_folder_is_said(
    home: Path, registered: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = home.with_name("moved home%20")
    home.rename(moved)
    try:
        monkeypatch.setenv("LORAT_HOME", str(moved))
        uri = f"models:/lorat/{registered['version']}"
        with pytest.raises(UserError, match=f"lists {uri}, but its files are not at file://{home}"):
            versions.resolve(uri)
        with pytest.raises(UserError, match="There is no models:/lorat/77 in MLflow"):
            versions.resolve("models:/lorat/77")
        home.symlink_to(moved)
        assert (versions.resolve(uri) / "model.safetensors").is_file()
        home.unlink()
    finally:
        moved.rename(home)


def test_failed_registration_leaves_no_version(
    registered: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import lorat_platform.registry.package

    def broken(*arguments: object, **options: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(lorat_platform.registry.package, "package", broken)
    before = len(connect().search_model_versions("name='lorat'"))
    with pytest.raises(OSError, match="no space"):
        versions.register(random_tracker(), run_id=registered["run_id"])
    assert len(connect().search_model_versions("name='lorat'")) == before
    assert connect().get_model_version_by_alias("lorat", "candidate").version in (1, "1")
