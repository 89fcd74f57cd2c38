"""What a training is asked for, and what that means on a cluster, is checked before it starts."""

from __future__ import annotations

from typing import Any

import pytest
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
)
from ray.train.v2.api.exceptions import ControllerError

from lorat.errors import UserError
from lorat_platform.cluster.connection import Cluster
from lorat_platform.training import driver
from lorat_platform.training.options import RunOptions
from lorat_platform.training.resources import Placement


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (WorkerGroupStartupTimeoutError(2), "did not give the 2 CPUs .* lower --workers"),
        (
            WorkerGroupStartupFailedError("a node died"),
            "could not be started, .* a node died; look",
        ),
    ],
)
def test_workers_that_do_not_start_end_with_a_sentence(failure: Exception, message: str) -> None:
    cluster = Cluster(embedded=False, address="127.0.0.1:1", cpus=8, gpus=0, nodes=2)
    place = Placement.plan(RunOptions(workers="2", cpus_per_worker=1), cluster, batch_size=8)

    class Trainer:
        def fit(self) -> None:
            raise ControllerError(failure)

    with pytest.raises(UserError, match=message):
        driver._run(Trainer(), place, lambda: None)


def test_more_than_the_machine_has_is_refused_at_once() -> None:
    machine = Cluster(embedded=True, address="", cpus=2, gpus=0, nodes=1)
    with pytest.raises(UserError, match="do not fit into the 2 CPUs"):
        Placement.plan(RunOptions(workers="3"), machine, 64)
    with pytest.raises(UserError, match="need a GPU each"):
        Placement.plan(RunOptions(workers="1", device="gpu"), machine, 64)
    with pytest.raises(UserError, match="at most one worker per pair"):
        Placement.plan(RunOptions(workers="1:9"), machine, 8)
    place = Placement.plan(RunOptions(workers="1:2"), machine, 64)
    assert (place.low, place.high, place.cpus, place.threads) == (1, 2, 1, 1)


@pytest.mark.parametrize("workers", ["0", "2:1", "a", "1:2:3", "-1"])
def test_a_wrong_number_of_workers_is_refused(workers: str) -> None:
    with pytest.raises(UserError, match="workers is"):
        RunOptions(workers=workers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cpus_per_worker": 0}, "--cpus-per-worker is 0; give 1 to 1024."),
        ({"val_pairs": -1}, "--val-pairs is -1; give 0 to 1,000,000."),
        ({"val_gpus": -0.5}, "--val-gpus is -0.5; give 0 to 64."),
        ({"val_gpus": 1.5}, "--val-gpus is 1.5; give a part of one GPU, or whole ones."),
        ({"max_failures": -2}, "--max-failures is -2; give -1 to 1,000,000."),
        ({"name": "a b"}, "--name is 'a b'; give letters"),
    ],
)
def test_a_wrong_option_is_named_as_it_is_given(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        RunOptions(**options)
    assert str(caught.value).startswith(message)


def test_baselines_are_chosen_or_fit_the_number_of_sequences() -> None:
    assert RunOptions().chosen_baselines(50) == ("static", "mil")
    assert RunOptions().chosen_baselines(51) == ("static",)
    assert RunOptions(baselines=("none",)).chosen_baselines(5) == ()
    assert RunOptions(baselines=("mil",)).chosen_baselines(500) == ("mil",)
    with pytest.raises(UserError, match="give none alone"):
        RunOptions(baselines=("none", "mil"))
