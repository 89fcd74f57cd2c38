"""Learning curves of configurations over seeds, by sequence: what searches can be replayed with.

Each configuration is trained in full with each seed; configurations share the samples of a seed.
The file is a table with a row per configuration, seed, step and sequence.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from lorat.config.bounds import Bounds, check_bounds
from lorat.config.fields import flag
from lorat.config.json_files import read_json_at
from lorat.config.training import TrainConfig
from lorat.errors import UserError, named
from lorat.files import storage
from lorat.files.outputs import check_file
from lorat.metrics.catalogue import SCORES
from lorat_platform import cluster
from lorat_platform.search.benchmark import in_order, run_or_go_on
from lorat_platform.search.dimension import latin_hypercube
from lorat_platform.search.plan import SearchOptions, SearchPlan, check_data, make_plan
from lorat_platform.search.results.board import Leaderboard
from lorat_platform.search.trial.progress import sequences_file, sequences_folder

log = logging.getLogger(__name__)

FLAT = tyro.conf.arg(name="")
STREAM = 89
"""Stream number of the configurations, beside the searcher's seed."""
FILE = Path(__file__).parent / "curves.parquet"
"""The curves that are shipped."""


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Learning curves."""

    values: tuple[Mapping[str, Any], ...]
    """Of each configuration; the first is the default one."""
    steps: tuple[int, ...]
    """Of the evaluations, ascending."""
    sequences: tuple[str, ...]
    metric: str
    scores: np.ndarray
    """(configurations, seeds, steps, sequences)"""

    def write(self, path: Path) -> None:
        """Write the table, scores to four decimals."""
        c, s, t, q = (axis.ravel() for axis in np.indices(self.scores.shape))
        table = pa.table(
            {
                "configuration": pa.array(c, pa.int16()),
                "seed": pa.array(s, pa.int16()),
                "step": pa.array(np.array(self.steps)[t], pa.int32()),
                "sequence": pa.array(np.array(self.sequences)[q]).dictionary_encode(),
                self.metric: pa.array(np.round(self.scores.ravel(), 4).astype(np.float32)),
            }
        )
        values = json.dumps([dict(each) for each in self.values])
        table = table.replace_schema_metadata({"values": values, "metric": self.metric})
        pq.write_table(table, path, compression="zstd")


def read_curves(path: Path = FILE) -> Curves:
    """Read a table of curves.

    Raises:
        UserError: if it is none, or lacks a row.
    """
    try:
        table = pq.read_table(path)
        about = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
        values, metric = tuple(json.loads(about["values"])), about["metric"]
        columns = [table[name].to_numpy() for name in ("configuration", "seed", "step")]
        names = np.array(table["sequence"].to_pylist())
        scores = table[metric].to_numpy()
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise UserError(
            f"{named(path)} holds no curves ({error}); make them with 'python jobs/benchmark.py "
            "curves --output FILE'."
        ) from error
    axes = [np.unique(column, return_inverse=True) for column in (*columns, names)]
    shape = tuple(len(kinds) for kinds, _ in axes)
    found = np.full(shape, np.nan)
    found[tuple(place for _, place in axes)] = scores
    if np.isnan(found).any() or len(values) != shape[0]:
        raise UserError(
            f"{named(path)} lacks curves of some configuration and seed; go on with 'python "
            "jobs/benchmark.py curves' until it says that all are there."
        )
    return Curves(
        values=values,
        steps=tuple(int(step) for step in axes[2][0]),
        sequences=tuple(str(name) for name in axes[3][0]),
        metric=metric,
        scores=found,
    )


def curves_config() -> TrainConfig:
    """Return what is trained where nothing is given: an eighth of a search's trial of T-112."""
    return TrainConfig(variant="T-112", epochs=4, pairs_per_epoch=512, batch_size=16)


def curves_options() -> SearchOptions:
    """Return what is searched where nothing is given: 24 configurations, five evaluations each."""
    return SearchOptions(trials=24, searcher="random", scheduler="none", reduction=2, rungs=5)


@dataclass(frozen=True, kw_only=True)
class CurvesBenchmark:
    """Train configurations with several seeds, and write their curves for replayed searches."""

    config: Annotated[TrainConfig, FLAT] = field(default_factory=curves_config)
    search: Annotated[SearchOptions, FLAT] = field(default_factory=curves_options)
    seeds: Annotated[int, Bounds(2, 1000)] = 8
    """Seeds of each configuration, 2 to 1000, from --seed on; --trials is how many configurations
    there are, the default one among them."""
    output: Path
    """Parquet file for the curves."""
    address: str | None = None
    """Ray cluster, host:port; none means RAY_ADDRESS, or an embedded Ray."""

    def __post_init__(self) -> None:
        check_bounds(self, flag)


def benchmark_curves(benchmark: CurvesBenchmark) -> dict[str, Any]:
    """Train what is wanted, or go on with it, write the curves and return how many there are.

    Raises:
        UserError: if the request cannot be, or a training failed.
    """
    check_file(benchmark.output)
    seeds = range(benchmark.config.seed, benchmark.config.seed + benchmark.seeds)
    plan = make_plan(benchmark.config, benchmark.search)
    rng = np.random.default_rng([plan.options.search_seed, STREAM])
    spread = latin_hypercube(plan.space.trained, plan.options.trials - 1, rng)
    points = [plan.space.prior(), *spread]
    check_data(plan)
    boards = []
    with cluster.connected(benchmark.address) as ray_cluster:
        log.info("Training with %s.", ray_cluster)
        for seed in seeds:
            name = f"{plan.name}-seed-{seed}"
            config = dataclasses.replace(benchmark.config, seed=seed)
            of_seed = make_plan(config, dataclasses.replace(plan.options, name=name))
            boards.append((of_seed, run_or_go_on(of_seed, points).board))
    curves = curves_of(boards)
    curves.write(benchmark.output)
    kinds, number, steps, sequences = curves.scores.shape
    log.info(
        "%s has %d configurations with %d seeds, each after %s steps on %d sequences.",
        named(benchmark.output), kinds, number, " ".join(map(str, curves.steps)), sequences,
    )  # fmt: skip
    return {"configurations": kinds, "seeds": number, "steps": steps, "sequences": sequences}


def curves_of(boards: Sequence[tuple[SearchPlan, Leaderboard]]) -> Curves:
    """Return the curves that trials of the same configurations have left, by seed.

    Raises:
        UserError: if a trial failed.
    """
    (plan, board), *_ = boards
    metric = plan.options.objectives[0]
    if metric not in SCORES:
        raise UserError(
            f"--objective is {metric}, which no sequence has; give one of {', '.join(SCORES)}."
        )
    by_seed = [_scores(*each, metric) for each in boards]
    return Curves(
        values=tuple(row.values for row in in_order(board)),
        steps=plan.rungs.steps,
        sequences=tuple(by_seed[0][0][0]),
        metric=metric,
        scores=np.array([[[list(e.values()) for e in t] for t in s] for s in by_seed]).swapaxes(
            0, 1
        ),
    )


def _scores(plan: SearchPlan, board: Leaderboard, metric: str) -> list[list[dict[str, float]]]:
    """Return the scores of a seed's trials by rung and sequence."""
    folder = storage.locate(plan.storage).child(plan.name)
    scores = []
    for row in in_order(board):
        if row.status != "completed":
            raise UserError(
                f"Trial {row.number} of {plan.name} {row.status}: {row.reason}; mend that and go "
                "on with the same command."
            )
        place, remedy = sequences_folder(folder, row.trial_id), "train again under another --name"
        rungs = [
            read_json_at(place, sequences_file(rung), remedy, shape=list)
            for rung in range(plan.rungs.num_rungs)
        ]
        scores.append(
            [
                {
                    f"{k} {name}": each[metric]
                    for k, s in enumerate(sets)
                    for name, each in s.items()
                }
                for sets in rungs
            ]
        )
    return scores
