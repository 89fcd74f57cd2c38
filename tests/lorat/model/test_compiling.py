"""A compiled training starts soon: one block is compiled for all, and its code is kept."""

from __future__ import annotations

import dataclasses
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

import lorat.model
from lorat.model import CODE_CACHE
from tests.jobs.in_process import ROOT
from tests.lorat.tiny_models import MLP_VARIANT, batch, tiny_model


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch looks at it itself
@pytest.mark.parametrize("drop_path", [0.0, 0.1])
def test_all_blocks_use_the_code_of_one(drop_path: float) -> None:
    model = tiny_model(dataclasses.replace(MLP_VARIANT, depth=12), drop_path=drop_path)
    images = batch()
    torch.manual_seed(0)
    plain = model(*images)["score_map"]
    model.compile(backend="eager", dynamic=False)
    torch.manual_seed(0)
    assert torch.equal(model(*images)["score_map"], plain)
    assert counters["stats"]["unique_graphs"] == 1
    model.uncompile()
    counters.clear()
    model(*images)
    assert not counters["stats"]


def test_compiled_code_is_kept_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv(CODE_CACHE, "given")
    importlib.reload(lorat.model)
    assert os.environ[CODE_CACHE] == "given"
    monkeypatch.delenv(CODE_CACHE)
    importlib.reload(lorat.model)
    assert os.environ[CODE_CACHE] == str(tmp_path / "home" / "compiled")
    monkeypatch.delenv(CODE_CACHE)
    (tmp_path / "file").touch()
    monkeypatch.setenv("LORAT_HOME", str(tmp_path / "file" / "home"))
    importlib.reload(lorat.model)
    assert CODE_CACHE not in os.environ, "torch's own place, where the home folder cannot be"


STEP = """
import dataclasses
import ray.train.torch  # as in a training worker
from lorat.learning.loop import run
from torch._dynamo.utils import counters
from tests.lorat.learning.test_learner import CONFIG, source
learner = run(dataclasses.replace(CONFIG, compile="on"), source(), end_step=1)
assert learner.compiled
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
"""


@pytest.mark.exhaustive
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
def test_a_second_process_compiles_nothing_again(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != CODE_CACHE}
    environment |= {"LORAT_HOME": str(tmp_path / "home")}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "platform")])}
    printed = [
        subprocess.run(
            [sys.executable, "-c", STEP],
            check=True, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True,
        ).stdout.split()
        for _ in range(2)
    ]  # fmt: skip
    assert [(int(hits) > 0, int(misses) > 0) for hits, misses in printed] == [
        (False, True),
        (True, False),
    ]
    assert any((tmp_path / "home" / "compiled").iterdir())
