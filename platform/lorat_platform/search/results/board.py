"""The trials of a search as a table: status, rung reports, best, Pareto front, cost."""

from __future__ import annotations

import dataclasses
import time
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from lorat.metrics import METRICS
from lorat_platform.search.rungs import Rungs, pareto_fronts

Status = Literal["waiting", "running", "completed", "stopped", "failed"]

STATUSES: tuple[Status, ...] = typing.get_args(Status)

REPORTED = (
    *METRICS, "optimiser_steps", "pairs", "train_seconds", "evaluation_seconds",
    "crop_cache_hit_rate", "crops_decoded",
)  # fmt: skip
"""Numbers of a report that the table has as columns (the last report's)."""

MAX_LABEL = 200
"""Characters of a trial's name; MLflow takes 250."""

REPORT_FIELDS = ("step", "budget", *REPORTED, "total_seconds", "tracking", "settings")
"""Everything that is kept of a report."""


@dataclass(kw_only=True)
class TrialRow:
    """What is known of one trial."""

    number: int
    """Order in which the searcher proposed it, from 0."""
    trial_id: str
    values: dict[str, Any]
    """Searched fields by path."""
    status: Status = "waiting"
    reports: list[dict[str, Any]] = field(default_factory=list)
    """One per rung, ascending: step, budget, objectives, loss, times."""
    reason: str | None = None
    """Why it failed."""
    worker: str | None = None
    """Host and process that ran it last."""
    starts: int = 0
    """How often it was started: once, unless it went on after an interruption or a pause."""
    retries: int = 0
    """How often it was tried again in this process of the search."""
    troubles: list[str] = field(default_factory=list)
    """Failures of its surroundings after which it was tried again."""
    is_own_fault: bool = True
    """Whether it failed by itself, and not by its surroundings."""
    lost_steps: int = 0
    """Steps beside those of the reports: of attempts that failed or were interrupted, up to where
    they came or, where nobody knows that, to the rung that they were on the way to."""
    lost_seconds: float = 0.0
    """Seconds that those attempts took after their last reports."""
    counted_at: float | None = None
    """Time up to which the seconds of the present attempt are counted."""
    proposed_at: float | None = None
    started_at: float | None = None
    ended_at: float | None = None

    @property
    def tracking(self) -> dict[str, Any]:
        """The best setting of the fields below ``tracking`` in the last report, where searched."""
        return self.reports[-1].get("tracking", {}) if self.reports else {}

    @property
    def found(self) -> dict[str, Any]:
        """Searched fields by path: what was proposed, and how its weights track best."""
        return self.values | self.tracking

    @property
    def steps(self) -> int:
        """Optimisation steps up to the last report; with any batch size, those of the base's."""
        return self.reports[-1]["step"] if self.reports else 0

    @property
    def can_be_tried_again(self) -> bool:
        """Whether it failed by its surroundings, so that a resumed search tries it again."""
        return self.status == "failed" and not self.is_own_fault

    @property
    def spent(self) -> int:
        """Optimisation steps that were trained for it in all."""
        return self.steps + self.lost_steps

    @property
    def num_rungs(self) -> int:
        """Rungs reached."""
        return len(self.reports)

    def last(self, name: str) -> float | None:
        """Return a number of the last report, or none."""
        return self.reports[-1].get(name) if self.reports else None

    def report(self, values: dict[str, Any]) -> None:
        """Add a report; one at a step that was reported before replaces it and what followed."""
        self.counted_at = time.time()
        self.reports = [r for r in self.reports if r["step"] < values["step"]] + [values]


SHORT = {"lora.rank": "r", "head.depth": "d", "lora.alpha": "a", "lora.dropout": "drop"}
"""Short names of searched fields; others are called by the last part of their path."""


def trial_label(row: TrialRow, num_trials: int) -> str:
    """Name a trial by its number and values, such as ``t03 r16 lr2e-3 d3``.

    Args:
        row: of the trial.
        num_trials: of the search, whose last number gives the digits.
    """
    digits = max(2, len(str(num_trials - 1)))
    shown = [
        f"{SHORT.get(path, path.rpartition('.')[2])}{separator}{text}"
        for path, value in row.values.items()
        for text in [_value_text(value)]
        for separator in ["" if text[:1].isdigit() or text[:1] == "-" else "="]
    ]
    return " ".join([f"t{row.number:0{digits}d}", *shown])[:MAX_LABEL]


def _value_text(value: Any) -> str:
    """Write a value with two digits, small ones as ``2e-3``."""
    if not isinstance(value, float):
        return str(value)
    if value and abs(value) < 0.01:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.2g}"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Training spent, against training every trial in full."""

    steps: int
    """Optimisation steps, also of failed trials and those that were trained twice."""
    full_steps: int
    """The same with no trial stopped early: one that failed would have failed there, too."""
    lost_steps: int
    """Steps of attempts that failed or were interrupted, at most: see :class:`TrialRow`."""
    seconds: float
    """Seconds that trials ran, training and evaluation, added up."""

    @property
    def share(self) -> float:
        """Steps spent / steps of full runs of the same trials."""
        return self.steps / self.full_steps if self.full_steps else 1.0

    @property
    def saved(self) -> float:
        """Share of the full runs' steps that early stopping did not spend; below 0 where more was
        trained twice."""
        return 1.0 - self.share


@dataclass(kw_only=True)
class Leaderboard:
    """All trials of a search."""

    objectives: tuple[str, ...]
    rungs: Rungs
    rows: dict[str, TrialRow] = field(default_factory=dict)

    def add(self, trial_id: str, values: dict[str, Any]) -> TrialRow:
        """Return the trial's row, made if it is new."""
        if trial_id not in self.rows:
            self.rows[trial_id] = TrialRow(
                number=len(self.rows), trial_id=trial_id, values=dict(values)
            )
        return self.rows[trial_id]

    def ranked(self) -> list[TrialRow]:
        """Order by the first objective among those that got as far: later rungs come first."""
        name = self.objectives[0]
        sign = METRICS[name].sign
        scored = [row for row in self.rows.values() if row.reports and row.status != "failed"]
        order = sorted(scored, key=lambda r: (-r.num_rungs, -sign * r.reports[-1][name], r.number))
        rest = [row for row in self.rows.values() if row not in scored]
        return order + rest

    def best(self) -> TrialRow | None:
        """Return the best trial of the highest rung that any trial reached, or none."""
        ranked = self.ranked()
        good = ranked and ranked[0].reports and ranked[0].status != "failed"
        return ranked[0] if good else None

    def pareto(self) -> list[TrialRow]:
        """Return the trials that reached the highest rung and that no other one dominates."""
        best = self.best()
        if best is None:
            return []
        rows = [r for r in self.ranked() if r.reports and r.num_rungs == best.num_rungs]
        rows = [r for r in rows if r.status != "failed"]
        front = pareto_fronts(signed_objectives(rows, self.objectives))[0]
        return sorted((rows[i] for i in front), key=lambda r: r.reports[-1][self.objectives[0]])

    def cost(self) -> Cost:
        """Add up what was spent on all trials that started."""
        started = [row for row in self.rows.values() if row.status != "waiting" or row.reports]
        return Cost(
            steps=sum(row.spent for row in started),
            full_steps=sum(
                row.spent if row.status == "failed" else self.rungs.max_steps for row in started
            ),
            lost_steps=sum(row.lost_steps for row in started),
            seconds=sum((row.last("total_seconds") or 0.0) + row.lost_seconds for row in started),
        )

    def lose(self, row: TrialRow, step: int | None) -> None:
        """Count what an attempt trained since its last report.

        Args:
            row: of the trial whose attempt ended without one.
            step: that it had reached; none if nobody knows.
        """
        if step is None:
            step = self.rungs.steps[min(row.num_rungs, self.rungs.num_rungs - 1)]
        row.lost_steps += max(step - row.steps, 0)
        if row.counted_at is not None:
            row.lost_seconds += time.time() - row.counted_at
        row.counted_at = None

    def count(self, *statuses: Status) -> int:
        """Return the number of trials with one of the statuses."""
        return sum(row.status in statuses for row in self.rows.values())

    def table(self) -> pa.Table:
        """Return one row per trial, best first."""
        ranked = self.ranked()
        front = {row.trial_id for row in self.pareto()}
        paths = list(dict.fromkeys(path for row in ranked for path in row.values))
        columns: dict[str, list[Any]] = {
            "trial": [row.number for row in ranked],
            "trial_id": [row.trial_id for row in ranked],
            "status": [row.status for row in ranked],
            "rung": [row.num_rungs for row in ranked],
            "steps": [row.steps for row in ranked],
            "pareto": [row.trial_id in front for row in ranked],
        }
        columns |= {path: [row.values.get(path) for row in ranked] for path in paths}
        fields = list(dict.fromkeys(path for row in ranked for path in row.tracking))
        columns |= {path: [row.tracking.get(path) for row in ranked] for path in fields}
        columns |= {name: [row.last(name) for row in ranked] for name in REPORTED}
        columns["reason"] = [row.reason for row in ranked]
        arrays = {name: _array(name, values) for name, values in columns.items()}
        return pa.table(arrays)

    def write(self, folder: Path) -> list[Path]:
        """Write ``trials.csv`` and ``trials.parquet`` and return their paths.

        Where the weights of trials were tried with several settings, ``settings`` as well.
        """
        folder.mkdir(parents=True, exist_ok=True)
        tables = {"trials": self.table(), "settings": self.settings_table()}
        paths = []
        for name, table in tables.items():
            if name == "trials" or table.num_rows:
                paths += [folder / f"{name}.csv", folder / f"{name}.parquet"]
                pyarrow.csv.write_csv(table, paths[-2])
                pq.write_table(table, paths[-1])
        return paths

    def settings_table(self) -> pa.Table:
        """Return one row per trial, rung and setting that its weights tracked with."""
        rows = [
            {"trial": row.number, "rung": rung + 1, "steps": report["step"]}
            | each["tracking"]
            | each["scores"]
            for row in self.ranked()
            for rung, report in enumerate(row.reports)
            for each in report.get("settings", ())
        ]
        return pa.Table.from_pylist(rows)

    def to_dict(self) -> dict[str, Any]:
        """Return the table as plain values for a snapshot."""
        return {
            "objectives": list(self.objectives),
            "rungs": dataclasses.asdict(self.rungs),
            "rows": [dataclasses.asdict(row) for row in self.rows.values()],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Leaderboard:
        """Build the table from what :meth:`to_dict` gave."""
        rows = [TrialRow(**row) for row in values["rows"]]
        return cls(
            objectives=tuple(values["objectives"]),
            rungs=Rungs(**values["rungs"]),
            rows={row.trial_id: row for row in rows},
        )

    def seconds_left(self, num_trials: int, elapsed: float, steps_before: int) -> float | None:
        """Estimate the remaining seconds from the steps per second of this process.

        Trials to come are assumed to take the steps that ended ones took on average.

        Args:
            num_trials: trials of the whole search.
            elapsed: seconds since this process went on with the search.
            steps_before: steps spent before that.
        """
        ended = [r for r in self.rows.values() if r.status in ("completed", "stopped", "failed")]
        spent = sum(row.steps for row in self.rows.values()) - steps_before
        if spent <= 0:
            return None
        longest = float(self.rungs.max_steps)
        typical = float(np.mean([row.steps for row in ended])) if ended else longest
        to_do = max(num_trials - len(self.rows), 0) * typical
        for row in self.rows.values():
            if row.status in ("waiting", "running"):
                to_do += max(typical - row.steps, float(self.rungs.steps[0]))
        return to_do * elapsed / spent


def signed_objectives(rows: Sequence[TrialRow], objectives: Iterable[str]) -> np.ndarray:
    """Return the last objectives (n, d) with signs such that more is better."""
    signs = {name: METRICS[name].sign for name in objectives}
    return np.array([[s * row.reports[-1][name] for name, s in signs.items()] for row in rows])


def _array(name: str, values: list[Any]) -> pa.Array:
    """Make a column; choices of mixed types become text."""
    if name == "reason":
        return pa.array(values, pa.string())
    if name in REPORTED:
        return pa.array(values, pa.float64())
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.array([None if v is None else str(v) for v in values], pa.string())
