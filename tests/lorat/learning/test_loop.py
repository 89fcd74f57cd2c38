"""The loop reports, stops, checkpoints, and handles what is not finite or damaged."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lorat.data.pairs.batches import Batch
from lorat.errors import UserError
from lorat.files.storage import locate
from lorat.learning.clock import PARTS
from lorat.learning.learner import Learner, World
from lorat.learning.loop import CHECKED_LATER, Hooks, _on_device, run
from lorat.learning.replay import replay
from tests.lorat.learning.test_learner import CONFIG, random_pairs, source


def test_metrics_of_every_interval_tell_where_the_time_went() -> None:
    seen: dict[int, dict[str, float]] = {}

    def keep(step: int, metrics: dict[str, float]) -> None:
        seen[step] = metrics

    run(CONFIG, source(), hooks=Hooks(log_every=8, on_interval=keep))
    assert list(seen) == [8, 16, 20]
    for metrics in seen.values():
        assert {f"system/time_ms/{part}" for part in PARTS} <= metrics.keys()
        assert metrics["system/samples_per_s"] > 0
        assert 0 <= metrics["system/data_stall_share"] <= 1
        assert 0 < metrics["system/mfu"] < 1
        assert metrics["grad_norm"] > 0
        assert metrics["system/memory_gb/host"] > 0
        assert metrics["system/bytes_per_pair"] == 100
        parts = sum(metrics[f"system/time_ms/{part}"] for part in PARTS)
        assert 0.7 * metrics["system/step_ms"] < parts <= 1.01 * metrics["system/step_ms"]
    assert seen[20]["epoch"] == 2.0


def test_a_hook_ends_the_loop_and_checkpoints_come_on_time() -> None:
    saved: list[int] = []
    hooks = Hooks(
        log_every=3,
        on_interval=lambda step, _: step >= 9,
        checkpoint_every=4,
        on_checkpoint=lambda learner, _: saved.append(learner.step),
        on_step=lambda step: step == 6,
    )
    learner = run(CONFIG, source(), hooks=hooks)
    assert learner.step == 9
    assert saved == [4, 6, 8, 9]


def spoilt(pairs: set[int]) -> Callable[[np.ndarray], Batch]:
    def load(indices: np.ndarray) -> Batch:
        batch = random_pairs(indices)
        for row, index in enumerate(indices.tolist()):
            if index in pairs:
                batch["search_box"][row] = np.nan
        return batch

    return load


def test_a_loss_that_is_not_finite_stops_and_is_dumped_for_replay(tmp_path: Path) -> None:
    learner = Learner(CONFIG)
    with pytest.raises(UserError, match=r"not finite at step 3 \(pairs 30 to 39\)") as caught:
        run(
            CONFIG,
            source(load=spoilt({34})),
            learner=learner,
            hooks=Hooks(dumps=locate(tmp_path)),
        )
    folder = tmp_path / "step-00000003-rank-0"
    assert f"--replay {locate(folder).uri}" in str(caught.value)
    assert all(torch.isfinite(p).all() for p in learner.model.parameters())
    text = replay(str(folder))
    assert "pair 34: loss nan" in text
    assert "1 of 10 pairs" in text


def test_a_loss_that_is_not_finite_can_be_skipped() -> None:
    config = dataclasses.replace(CONFIG, nonfinite="skip")
    learner = run(config, source(load=spoilt({34, 77, 78})))
    assert learner.step == 20
    assert learner.num_skipped == 2
    assert all(torch.isfinite(p).all() for p in learner.model.parameters())


def test_a_step_that_is_checked_one_later_is_left_out_and_named_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA, where to ask at once would leave the device without work."""
    config = dataclasses.replace(CONFIG, nonfinite="skip")
    spoilt_steps = source(load=spoilt({34, 77, 78}))

    def train() -> tuple[Learner, dict[int, dict[str, float]]]:
        seen: dict[int, dict[str, float]] = {}
        hooks = Hooks(log_every=4, on_interval=lambda step, found: seen.update({step: found}))
        return run(config, spoilt_steps, hooks=hooks), seen

    at_once, expected = train()
    monkeypatch.setitem(CHECKED_LATER, "cpu", 1)
    late, seen = train()
    assert late.num_skipped == at_once.num_skipped == 2
    for one, other in zip(late.parameters, at_once.parameters, strict=True):
        assert torch.equal(one, other)
    for step, metrics in expected.items():
        for name in ("train/loss", "train/loss_cls", "grad_norm", "lr", "skipped_steps"):
            assert seen[step][name] == metrics[name]
    learner = Learner(CONFIG)
    hooks = Hooks(dumps=locate(tmp_path))
    with pytest.raises(UserError, match=r"not finite at step 3 \(pairs 30 to 39\)") as caught:
        run(CONFIG, source(load=spoilt({34})), learner=learner, hooks=hooks)
    assert learner.step == 5
    assert all(torch.isfinite(p).all() for p in learner.model.parameters())
    assert "step 3, worker 0" in replay(str(tmp_path / "step-00000003-rank-0"))
    assert "step-00000003-rank-0" in str(caught.value)


def test_too_many_skipped_steps_are_counted_when_checked_one_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(CHECKED_LATER, "cpu", 1)
    config = dataclasses.replace(CONFIG, nonfinite="skip", max_skipped=3)
    learner = Learner(config)
    with pytest.raises(UserError, match="3 steps in a row were left out"):
        run(config, source(load=spoilt({5, 15, 35, 45, 55})), learner=learner)
    assert learner.step == 7


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_batches_are_augmented_ahead_as_in_the_step() -> None:
    learner = Learner(CONFIG, world=World(device=torch.device("cuda")))
    ahead = _on_device(iter(source().batches(0)), learner)
    for batch, inputs in itertools.islice(ahead, 3):
        found, expected = inputs(), learner.prepare(learner.to_device(batch))
        for one, other in zip(found, expected, strict=True):
            assert one.is_cuda
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    ahead.close()


def test_an_interval_without_a_step_that_counts_has_no_loss() -> None:
    config = dataclasses.replace(CONFIG, nonfinite="skip")
    seen: dict[int, dict[str, float]] = {}

    def keep(step: int, metrics: dict[str, float]) -> None:
        seen[step] = metrics

    hooks = Hooks(log_every=5, on_interval=keep)
    run(config, source(load=spoilt(set(range(0, 50, 10)))), hooks=hooks)
    for name in ("train/loss", "train/loss_cls", "train/loss_reg", "grad_norm"):
        assert np.isnan(seen[5][name])
        assert seen[10][name] > 0
    assert seen[5]["skipped_steps"] == 5


def test_too_many_skipped_steps_in_a_row_stop_the_training() -> None:
    config = dataclasses.replace(CONFIG, nonfinite="skip", max_skipped=3)
    learner = Learner(config)
    pairs = spoilt({5, 15, 35, 45, 55})  # steps 0 and 1, then 3, 4 and 5
    with pytest.raises(UserError, match="3 steps in a row were left out"):
        run(config, source(load=pairs), learner=learner)
    assert learner.step == 6


def test_replaying_a_folder_that_is_no_dump_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no .*dump\.json; give the folder"):
        replay(str(tmp_path))


@pytest.mark.parametrize(
    ("judged_from", "message"),
    [(50, "of 105 images are damaged"), (1000, "of 420 images are damaged")],
)
def test_too_many_damaged_images_stop_the_training_early_or_at_its_end(
    judged_from: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorat.learning.loop.FEWEST_IMAGES", judged_from)

    def load(indices: np.ndarray) -> Batch:
        batch = random_pairs(indices)
        batch["damaged"][indices % 10 == 0] = 1
        return batch

    hooks = Hooks(log_every=5)
    with pytest.raises(UserError, match=message):
        run(CONFIG, source(load=load), hooks=hooks)
    lenient = dataclasses.replace(CONFIG, max_damaged=0.06)
    assert run(lenient, source(load=load), hooks=hooks).step == 20


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    hooks = Hooks(dumps=locate(f"{folder}/dumps"))
    try:
        run(
            CONFIG,
            source(rank, 2, spoilt({37})),
            world=World(rank=rank, size=2),
            hooks=hooks,
        )
    except UserError as error:
        Path(folder, f"message-{rank}").write_text(str(error))
    dist.destroy_process_group()


def test_of_several_workers_the_one_at_fault_is_named_and_dumped(tmp_path: Path) -> None:
    mp.spawn(_worker, (str(tmp_path),), nprocs=2)
    messages = [(tmp_path / f"message-{rank}").read_text() for rank in range(2)]
    assert messages[0] == messages[1]
    assert "not finite at step 3 (pairs 35 to 39)" in messages[0]
    (folder,) = (tmp_path / "dumps").iterdir()
    assert folder.name == "step-00000003-rank-1"
    assert "1 of 5 pairs" in replay(str(folder))
