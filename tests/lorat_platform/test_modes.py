"""What is written is for whom the umask says, and what may not be read is called that."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from lorat import checkpoint
from lorat.checkpoint.folder import save_backbone, save_merged
from lorat.checkpoint.official import export_official
from lorat.config.json_files import write_json
from lorat.data.shards.from_memory import write_dataset
from lorat.data.shards.manifest import MANIFEST
from lorat.files.scratch import follow_umask, temporary_folder
from lorat.files.storage import locate
from lorat.files.tensors import write_tensors
from lorat.metrics import result_files
from lorat.tracking.clips import ClipWriter
from lorat_platform.runs import checkpoints
from tests.lorat.small_sets import tracks
from tests.lorat.tiny_models import tiny_config, tiny_model

NOBODY = 65534


@pytest.fixture(params=[0o022, 0o002, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def clip(path: Path) -> None:
    with ClipWriter(path) as writer:
        writer.write(np.zeros((32, 48, 3), np.uint8))


def run_with_a_checkpoint(folder: Path) -> None:
    folder.mkdir()
    with temporary_folder() as local:
        write_tensors({"a": torch.ones(2)}, local / "adapter" / "head.safetensors")
        checkpoints.upload(local, locate(folder), "step-00000020")


def copies_of_private_files(folder: Path) -> None:
    (folder / "code").mkdir(parents=True)
    (folder / "code" / "model.py").touch()
    for path in (folder, folder / "code", folder / "code" / "model.py"):
        path.chmod(0o700)
    follow_umask(folder)


WRITERS: dict[str, Callable[[Path], object]] = {
    "tensors": lambda p: write_tensors({"a": torch.ones(2)}, p / "a.safetensors"),
    "json": lambda p: write_json({}, p / "a.json"),
    "bytes at a location": lambda p: (p.mkdir(), locate(p).write_bytes("a", b"a")),
    "checkpoint": lambda p: checkpoint.save(tiny_model(), tiny_config(), p),
    "bundle": lambda p: save_merged(tiny_model(), p),
    "released file": lambda p: export_official(tiny_model(), p / "a.bin"),
    "backbone": lambda p: save_backbone(tiny_model(), p / "a.safetensors"),
    "shards": lambda p: write_dataset(str(p), tracks(1)),
    "uploaded checkpoint": run_with_a_checkpoint,
    "copies": copies_of_private_files,
    "clip": lambda p: clip(p / "a.mp4"),
    "results": lambda p: result_files.write_trackingnet(p / "a.zip", {"a": np.ones((1, 4))}),
}


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_modes_follow_the_umask(
    writer: Callable[[Path], object], umask: int, tmp_path: Path
) -> None:
    writer(tmp_path / "made")
    made = [tmp_path / "made", *(tmp_path / "made").rglob("*")]
    assert any(path.is_file() for path in made)
    for path in made:
        whole = 0o777 if path.is_dir() else 0o666
        assert path.stat().st_mode & 0o777 == whole & ~umask, path


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_is_told_what_may_not_be_read(tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o755)
    save_merged(tiny_model(), tmp_path / "bundle")
    export_official(tiny_model(), tmp_path / "released.bin")
    write_dataset(str(tmp_path / "shards"), tracks(1))
    hidden = ["bundle/model.safetensors", "released.bin", f"shards/{MANIFEST}"]
    code = f"""if True:
        import os
        from pathlib import Path
        from lorat import checkpoint
        from lorat.data.shards.frame_index import FrameIndex
        from lorat_platform.failures import surroundings_message, user_message
        root = Path({str(tmp_path)!r})
        openers = (
            lambda: checkpoint.load(root / "bundle"),
            lambda: checkpoint.load(root / "released.bin", variant="N-112"),
            lambda: FrameIndex.open(root / "shards"),
        )
        for open_it in openers:
            open_it()  # imports what another user may not import
        for name in {hidden!r}:
            (root / name).chmod(0o600)
        os.setuid({NOBODY})
        for open_it in openers:
            try:
                open_it()
                print("read")
            except Exception as error:
                print(user_message(error) or surroundings_message(error))
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    for file, line in zip(hidden, done.stdout.splitlines(), strict=True):
        assert file.partition("/")[0] in line
        assert "ermission denied" in line, line
