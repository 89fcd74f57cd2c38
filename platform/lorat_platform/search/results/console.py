"""The live table of a search: a rich table on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from lorat_platform.search.results.board import Leaderboard, TrialRow

REFRESH_S = 0.5
MAX_ROWS = 24


class SearchConsole:
    """Shows a leaderboard while it changes."""

    def __init__(self, board: Leaderboard, *, num_trials: int) -> None:
        self.board = board
        self.num_trials = num_trials
        self._stream = sys.stdout
        self._console = Console(file=self._stream)
        self._live: Live | None = None
        self._started_at = time.monotonic()
        self._steps_before = sum(row.steps for row in board.rows.values())
        self._refreshed_at = 0.0

    def start(self) -> None:
        """Begin to show."""
        self._started_at = time.monotonic()
        if self._console.is_terminal:
            self._live = Live(self.render(), console=self._console, auto_refresh=False)
            self._live.start()

    def stop(self) -> None:
        """Show the last state and let the terminal go."""
        if self._live is not None:
            self._live.update(self.render(), refresh=True)
            self._live.stop()
            self._live = None

    def refresh(self) -> None:
        """Redraw the live table if it is time."""
        if self._live is None or time.monotonic() < self._refreshed_at + REFRESH_S:
            return
        self._refreshed_at = time.monotonic()
        self._live.update(self.render(), refresh=True)

    def line(self, row: TrialRow, text: str) -> None:
        """Say what happened to a trial, where there is no live table."""
        if self._live is not None:
            return
        best = self.board.best()
        name = self.board.objectives[0]
        so_far = f", best {best.reports[-1][name]:.4f} (trial {best.number})" if best else ""
        values = ", ".join(f"{path} {_short(value)}" for path, value in row.values.items())
        values = f" ({values})" if values else ""
        print(
            f"[{_clock(time.monotonic() - self._started_at)}] trial {row.number}: {text}{values}"
            f"{so_far}, {self._left()}",
            file=self._stream,
            flush=True,
        )

    def _left(self) -> str:
        elapsed = time.monotonic() - self._started_at
        left = self.board.seconds_left(self.num_trials, elapsed, self._steps_before)
        return "time left unknown" if left is None else f"about {_clock(left)} left"

    def render(self) -> Table:
        """Draw the trials: running first, then the best."""
        board = self.board
        best = board.best()
        ended = board.count("completed", "stopped", "failed")
        name = board.objectives[0]
        so_far = f"best {name} {best.reports[-1][name]:.4f} (trial {best.number})" if best else ""
        table = Table(
            title=f"{ended} of {self.num_trials} trials ended, {so_far}",
            caption=f"{_clock(time.monotonic() - self._started_at)} passed, {self._left()}; "
            f"{board.cost().share:.0%} of the steps of full runs",
        )
        paths = list(dict.fromkeys(path for row in board.rows.values() for path in row.values))
        for column in ("trial", "status", "rung", "step", *paths, *board.objectives, "loss"):
            table.add_column(column, justify="right" if column != "status" else "left")
        ranked = board.ranked()
        running = [row for row in ranked if row.status == "running"]
        shown = (running + [row for row in ranked if row not in running])[:MAX_ROWS]
        for row in shown:
            table.add_row(
                str(row.number),
                _status(row),
                f"{row.num_rungs}/{board.rungs.num_rungs}",
                f"{row.steps}/{board.rungs.max_steps}",
                *(_short(row.values.get(path)) for path in paths),
                *(_short(row.last(objective)) for objective in board.objectives),
                _short(row.last("loss")),
                style="bold" if row is best else None,
            )
        if len(board.rows) > len(shown):
            table.add_row(f"+{len(board.rows) - len(shown)}", "more")
        return table


def _status(row: TrialRow) -> str:
    if row.reason is not None:
        return f"failed: {row.reason[:40]}"
    return f"{row.status}, try {row.retries + 1}" if row.retries else row.status


def _short(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
