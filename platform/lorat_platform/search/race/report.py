"""What a race says: on the console, in the search's run, and as tags of what is registered."""

from __future__ import annotations

import csv
import io
import json
import math
from typing import Any

from matplotlib.figure import Figure

from lorat.metrics import METRICS
from lorat.metrics.plots import COLORS, new_axes
from lorat.metrics.uncertainty import Interval
from lorat_platform.evaluation.report import markdown_table
from lorat_platform.search.plan import SearchPlan
from lorat_platform.search.race.contenders import DEFAULT
from lorat_platform.search.race.race import Race
from lorat_platform.search.results.board import Leaderboard


def interval_text(interval: Interval) -> str:
    """Write an interval; one seed gives none."""
    if not math.isfinite(interval.low + interval.high):
        return "(one seed tells no interval)"
    return f"[{interval.low:+.4f}, {interval.high:+.4f}]"


def after_round(race: Race) -> str:
    """Say in a line how a race stands."""
    last, found, sign = race.rounds[-1], race.standings, METRICS[race.metric].sign
    said = f"race: seed {last.seed} ({len(race.seeds)} of at most {race.rules.max_seeds})"
    for name, reason in last.failed.items():
        said += f"; {name} is out, its training failed: {reason}"
    if found is None:
        return f"{said}; {', '.join(race.scores) or 'nobody'} is left"
    for each in found.standings:
        if each.name == found.leader:
            said += f"; {each.name} leads with {race.metric} {sign * each.mean:.4f}"
        elif each.left_after is None or each.left_after == len(race.seeds):
            left = "" if each.left_after is None else " and leaves"
            said += f"; {each.name} {each.difference:+.4f} {interval_text(each.interval)}{left}"
    return said + (f"; over: {found.reason}" if found.over else "")


def conclusion(race: Race) -> str:
    """Say in Markdown what a race has shown."""
    label, found = METRICS[race.metric].label, race.verdict
    lines = []
    if found is None:
        lines.append(f"**The race: {race.said}.**")
    else:
        seeds = len(found.per_seed[found.winner])
        said = "worse than the default" if race.said == "worse" else race.said
        lines.append(
            f"**The race: {found.winner} is {said}.** {label} {found.minus_default:+.4f} "
            f"{interval_text(found.interval)} against the default, over {seeds} new seeds and "
            f"{len(race.sequences)} sequences, each training in full. The intervals of all pairs "
            f"hold together with {race.rules.confidence:.0%}, however often was looked."
        )
    if race.chosen is not None:
        regret = (
            f"; the best is expected to be better than it by {found.regret:.4f}"
            if found is not None and math.isfinite(found.regret)
            else ""
        )
        why = ", being the simpler" if race.chosen == DEFAULT and race.verdict else ""
        lines.append(f"Chosen is {race.chosen}{why}: P(best) {_share(race, race.chosen)}{regret}.")
    lines.append(_table(race))
    if (stand := race.standings) is not None and stand.over:
        lines.append(f"Why it ended: {stand.reason}.")
    return "\n\n".join(lines)


def _share(race: Race, name: str) -> str:
    return f"{race.p_best[name]:.0%}"


def _table(race: Race) -> str:
    """Return a row per contender: the leader first, those that failed last."""
    values = {each.name: each.values for each in race.contenders}
    rows: list[list[object]] = []
    stand, regrets = race.standings, race.verdict.regrets if race.verdict else {}
    for each in stand.standings if stand is not None else ():
        regret = regrets.get(each.name, math.inf)
        rows.append(
            [
                each.name,
                each.num_seeds,
                f"{METRICS[race.metric].sign * each.mean:.4f}",
                "leads"
                if stand is not None and each.name == stand.leader
                else f"{each.difference:+.4f} {interval_text(each.interval)}",
                _share(race, each.name),
                f"{regret:.4f}" if math.isfinite(regret) else "",
                f"left after {each.left_after} seeds" if each.left_after else "",
            ]
        )
    for name in race.scores if stand is None else ():
        means = list(race.means(name).values())
        mean = f"{sum(means) / len(means):.4f}"
        rows.append([name, len(means), mean, "alone", _share(race, name), "", ""])
    for name, reason in race.failed.items():
        rows.append([name, len(race.means(name)), "", "", "", "", f"failed with {reason}"])
    fields = list(race.contenders[0].values)
    head = ["contender", "seeds", METRICS[race.metric].label, "to the leader", "P(best)"]
    return markdown_table(
        [*head, "expected regret", "race", *fields],
        [[*row, *(_text(values[str(row[0])][path]) for path in fields)] for row in rows],
    )


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def account(race: Race, board: Leaderboard) -> str:
    """Say what a race cost beside its search."""
    search, steps = board.cost(), race.steps
    return (
        f"The race took {steps} steps more, {search.steps + steps} in all with the search: "
        f"{(search.steps + steps) / max(search.full_steps, 1):.0%} of the steps of full runs of "
        "its trials."
    )


def search_tags(race: Race, board: Leaderboard) -> dict[str, Any]:
    """Return the tags of the search's run."""
    return {f"lorat.{name}": value for name, value in tags_of(race).items()} | {
        "lorat.steps_spent": board.cost().steps + race.steps,
        "lorat.race.steps": race.steps,
        "lorat.race.chosen": race.chosen or "none",
    }


def tags_of(race: Race) -> dict[str, str]:
    """Return the tags of what is registered that say how sure its choice is."""
    found = race.verdict
    tags = {
        "race.verdict": race.said,
        "race.p_best": json.dumps({name: round(p, 4) for name, p in race.p_best.items()}),
    }
    if found is not None and math.isfinite(found.regret):
        tags |= {
            "race.winner": found.winner,
            "race.minus_default": f"{found.minus_default:+.4f}",
            "race.interval": interval_text(found.interval),
            "race.regret": f"{found.regret:.4f}",
        }
    return tags


def draw_race(race: Race, plan: SearchPlan) -> Figure:
    """Draw each contender's difference to the default by seed; to the leader, where that failed."""
    scores, sign = race.scores, METRICS[race.metric].sign
    other = DEFAULT if DEFAULT in scores else race.chosen
    axes = new_axes(
        f"Race of {plan.name}", "seed", f"{METRICS[race.metric].label}, difference to {other}"
    )
    theirs = race.means(other) if other is not None else {}
    places = {seed: place for place, seed in enumerate(race.seeds)}
    for number, name in enumerate(each for each in scores if each != other):
        means = {seed: mean for seed, mean in race.means(name).items() if seed in theirs}
        axes.plot(
            [places[seed] for seed in means],
            [sign * (mean - theirs[seed]) for seed, mean in means.items()],
            marker="o", color=COLORS[number % len(COLORS)],
            label=name + (" (chosen)" if name == race.chosen else ""),
        )  # fmt: skip
    within = race.rules.within
    axes.axhspan(-within, within, color="black", alpha=0.08, label=f"within {within:g}")
    axes.axhline(0, color="black", linewidth=1)
    axes.set_xticks(list(places.values()), [str(seed) for seed in places])
    axes.legend(frameon=False, fontsize=8)
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    return figure


def scores_csv(race: Race) -> bytes:
    """Return the score of each contender by seed, and its difference to the default."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["contender", "seed", race.metric, "minus_default"])
    default = race.means(DEFAULT)
    for each in race.contenders:
        for seed, mean in race.means(each.name).items():
            minus = f"{mean - default[seed]:.6f}" if seed in default else ""
            writer.writerow([each.name, seed, f"{mean:.6f}", minus])
    return text.getvalue().encode()
