"""One trial: train to each rung, track the validation sequences, report, until stopped.

A trial of one worker runs inside of Ray Tune's process, which serves one trial after another, so
that nothing is imported or started again.  What a rung reported lies in its checkpoint, from which
the trial goes on after any interruption; long rungs are saved in between, too.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ray import tune

from lorat.config.json_files import read_json, write_json
from lorat.config.training import TrainConfig
from lorat.files import checksums, storage
from lorat.files.scratch import temporary_folder
from lorat.learning.learner import Learner, World
from lorat.learning.loop import Hooks, run
from lorat.learning.tail_average import TailAverage
from lorat_platform.failures import trial_failures
from lorat_platform.recording.system_metrics import SystemMonitor
from lorat_platform.runs import checkpoints
from lorat_platform.search.rungs import HISTORY
from lorat_platform.search.trial.measure import measure
from lorat_platform.search.trial.process import (
    batch_source,
    open_cache,
    prepare_process,
    rung_average,
    start_weights,
)
from lorat_platform.search.trial.progress import (
    SEQUENCES,
    Progress,
    TrialSetup,
    sequences_file,
    sequences_folder,
)

STATE_FILE = "trial.json"


def run_trial(values: dict[str, Any], setup: TrialSetup) -> None:
    """Run a trial of one worker; a function trainable of Ray Tune.

    Raises:
        TrialFailed: for whatever reason, which it says.
    """
    began = time.perf_counter()
    learner: Learner | None = None
    with (
        trial_failures(
            lambda: setup.counted(learner.config, learner.step) if learner is not None else 0
        ),
        contextlib.ExitStack() as stack,
    ):
        config = setup.space.configure(values)
        device = prepare_process(setup)
        folder, progress = stack.enter_context(_saved_state(setup, config))
        learner = Learner(
            config,
            world=World(device=device),
            resume=folder,
            start_weights=start_weights(config) if folder is None else None,
        )
        before = progress.total_seconds
        cache = stack.enter_context(open_cache(config, setup))
        monitor = stack.enter_context(SystemMonitor(setup.sample_every_s))
        for rung in range(len(progress.history), setup.rungs.num_rungs):
            step = setup.steps(config)[rung]
            average = rung_average(learner, setup, rung, folder)
            trained = time.perf_counter()
            run(
                config,
                batch_source(cache, config, setup, learner.world, step),
                world=learner.world,
                hooks=training_hooks(setup, trial_folder(setup), progress, learner, average, step),
                learner=learner,
                end_step=step,
            )
            progress.train_seconds += time.perf_counter() - trained
            measured = measure(learner, config, setup, progress, cache, average)
            seconds = before + time.perf_counter() - began
            report = progress.report(setup, rung, measured, seconds) | monitor.take()
            with temporary_folder() as name:
                learner.save(name)
                hand_over(report, progress, name, setup)


def hand_over(report: dict[str, Any], progress: Progress, folder: Path, setup: TrialSetup) -> None:
    """Give report and checkpoint to Ray Tune, which may end the trial here.

    What was measured of the sequences goes into a file: Tune's snapshot is written every second.
    """
    trial_id = str(tune.get_context().get_trial_id())
    place = sequences_folder(storage.locate(setup.folder), trial_id)
    place.make()
    content = json.dumps(report.pop(SEQUENCES))
    place.write_bytes(sequences_file(len(progress.history) - 1), content.encode())
    _write_progress(progress, folder)
    tune.report(
        report | {HISTORY: progress.history},
        checkpoint=tune.Checkpoint.from_directory(str(folder)),
    )


def save_state(
    learner: Learner, folder: storage.Location, progress: Progress, average: TailAverage
) -> None:
    """Save a trial between rungs, complete or not at all; the last two are kept."""
    folder.make()
    with temporary_folder() as name:
        learner.save(name)
        average.save(name)
        _write_progress(progress, name)
        checkpoints.upload(name, folder, checkpoints.name_of(learner.step))
    for old in checkpoints.names(folder)[:-2]:
        checkpoints.delete(folder, old)


def _write_progress(progress: Progress, folder: Path) -> None:
    write_json(progress.to_dict(), folder / STATE_FILE)
    checksums.seal(folder, STATE_FILE)


def read_progress(folder: Path | None) -> Progress:
    """Read what :func:`hand_over` wrote, or begin."""
    if folder is None:
        return Progress(history=[])
    checksums.check(folder, STATE_FILE)
    remedy = "delete that checkpoint and resume the search"
    return Progress(**read_json(folder / STATE_FILE, remedy, shape=Progress, finite=False))


def trial_folder(setup: TrialSetup) -> storage.Location:
    """Return where this trial keeps what Ray Tune does not."""
    trial_id = tune.get_context().get_trial_id()
    return storage.locate(setup.folder).child(checkpoints.BETWEEN_RUNGS).child(str(trial_id))


def training_hooks(
    setup: TrialSetup,
    folder: storage.Location,
    progress: Progress,
    learner: Learner,
    average: TailAverage,
    end_step: int,
    *,
    rank: int = 0,
    save_end: bool = False,
) -> Hooks:
    """Add up losses and weights of a rung, and let worker 0 save every few minutes before its end.

    Args:
        setup: of the search.
        folder: where to save.
        progress: takes the losses.
        learner: that is going to train.
        average: takes worker 0's weights, which are every worker's.
        end_step: of the rung.
        rank: of this worker.
        save_end: also save at the end of the rung, where no report does it.
    """
    saved = time.perf_counter()
    summed = learner.step - learner.num_skipped

    def after_step(step: int) -> bool:
        if rank == 0:
            average.add(step)
        late = time.perf_counter() - saved > setup.save_every_s
        return rank == 0 and step < end_step and step % setup.sum_every == 0 and late

    def save(learner: Learner, _: dict[str, float]) -> None:
        nonlocal saved
        if rank == 0 and (save_end or learner.step < end_step):
            save_state(learner, folder, progress, average)
            saved = time.perf_counter()

    def add(step: int, values: dict[str, float]) -> None:
        nonlocal summed
        trained = step - learner.num_skipped
        progress.add_losses(values["train/loss"], trained - summed)
        summed = trained

    return Hooks(log_every=setup.sum_every, on_interval=add, on_step=after_step, on_checkpoint=save)


@contextlib.contextmanager
def _saved_state(setup: TrialSetup, config: TrainConfig) -> Iterator[tuple[Path | None, Progress]]:
    """Fetch the state to go on from: the last rung's, or a later one saved on the way."""
    checkpoint = tune.get_checkpoint()
    with contextlib.ExitStack() as stack:
        folder: Path | None = None
        if checkpoint is not None:
            folder = Path(stack.enter_context(checkpoint.as_directory()))
        progress = read_progress(folder)
        step = setup.steps(config)[len(progress.history) - 1] if progress.history else 0
        later = checkpoints.newest(trial_folder(setup))
        if later is not None and (checkpoints.step_of(later) or 0) > step:
            scratch = stack.enter_context(temporary_folder())
            folder = checkpoints.download(trial_folder(setup), later, scratch)
            # Times are the rung's: what was trained since is counted by nobody.
            saved = read_progress(folder)
            progress.loss_sum, progress.loss_steps = saved.loss_sum, saved.loss_steps
        yield folder, progress
