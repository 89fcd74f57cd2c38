"""An evaluation from its trackers to the report and the MLflow run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorat_platform.evaluation import contest, gap
from lorat_platform.evaluation.contest import Entrant
from lorat_platform.evaluation.workers import EvaluationConfig
from lorat_platform.recording.run import Run


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """What is evaluated, and where it goes."""

    entrants: list[Entrant]
    uris: list[str]
    folder: Path
    """Of the report."""
    experiment: str
    config: EvaluationConfig
    clips: bool = True
    dialect: str | None = None
    """In which scores are given as well."""
    explain: Path | None = None
    """Published result files from which the gap is explained; of one entrant alone."""


def evaluate_plan(
    plan: EvaluationPlan, run: Run, *, before_writing: Callable[[], object] = lambda: None
) -> str:
    """Evaluate, write the report and fill the MLflow run; return the Markdown.

    Args:
        plan: what to do.
        run: of the evaluation.
        before_writing: called once everything is tracked.
    """
    by_set = [
        contest.evaluate_entrants(
            plan.entrants, uri, plan.config,
            dialect=plan.dialect, as_they_are=plan.explain is not None,
        )
        for uri in plan.uris
    ]  # fmt: skip
    results = [list(of_one) for of_one in zip(*by_set, strict=True)]
    before_writing()
    text = contest.write_comparison(plan.entrants, results, plan.folder, clips=plan.clips)
    explanation = ""
    if plan.explain is not None:
        explanation = gap.explain_gaps(
            plan.entrants[0], results[0], plan.explain, plan.folder, dialect=plan.dialect, run=run
        )
    settings = {
        "model": [entrant.name for entrant in plan.entrants],
        "data": plan.uris,
        "variant": [entrant.variant for entrant in plan.entrants],
    }
    (plan.folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    contest.record_all(
        run, plan.entrants, results, plan.folder,
        experiment=plan.experiment, explanation=explanation,
    )  # fmt: skip
    return "\n".join(filter(None, (text, _in_words(results, plan.dialect), explanation)))


def _in_words(results: Sequence[Sequence[contest.DatasetResult]], dialect: str | None) -> str:
    """Say the scores in the dialect that was asked for, in a line per data set."""
    if dialect is None:
        return ""
    lines = [
        f"{result.name} as {dialect}: "
        + ", ".join(f"{k} {v:.4f}" for k, v in result.evaluations[dialect].scores.items())
        for each in results
        for result in each
        if dialect in result.evaluations
    ]
    return "\n".join(lines) + "\n"
